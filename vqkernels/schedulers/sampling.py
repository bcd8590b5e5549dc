"""A whole sampling loop as a function: the same samples for the same seeds, whatever the batch.

The noise of sample `sample_ids[i]` is keyed by (seed, its id, step): the first noise by stream 0,
that of the steps by stream 1. Guidance: Ho & Salimans 2022, arXiv:2207.12598; rescaled: Lin et al.
2023, arXiv:2305.08891; on an interval: Kynkäänniemi et al. 2024, arXiv:2404.07724.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqkernels._optional import progress_bar
from vqkernels.ops._noise import check_sample_ids
from vqkernels.ops.normal_noise import normal_noise
from vqkernels.schedulers._scheduler import Scheduler

Model = Callable[..., Any]


@dataclass
class SamplingState:
    """A loop between two steps: what `sample(state=...)` goes on from; `torch.save` stores it.

    Attributes:
        step: model calls made so far.
        sample: `[B, ...]`.
        memory: what the scheduler keeps from earlier steps.
    """

    step: int
    sample: Tensor
    memory: dict[str, Any]


@torch.no_grad()
def sample(
    model: Model,
    scheduler: Scheduler,
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    num_inference_steps: int | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    unconditional: Mapping[str, Tensor] | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    latents: Tensor | None = None,
    state: SamplingState | None = None,
    on_step: Callable[[SamplingState], None] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw samples from a diffusion or flow model.

    Args:
        model: called as `model(x, t, **conditions)` with x `[B, ...]` and t `[B]`; returns a tensor
            of x's shape, or an object with one as `.sample`, or a tuple that starts with one.
        scheduler: one of `vqkernels.schedulers`, after `set_timesteps`.
        shape: `[B, ...]` of the samples.
        seed: an int or an int64 tensor of one element.
        sample_ids: int64 `[B]`, 0..B-1 by default: who the samples are, whatever their batch.
        num_inference_steps: calls `scheduler.set_timesteps(num_inference_steps)` first.
        conditions: keyword arguments of the model, each `[B, ...]`.
        unconditional: the same keys without the condition; needed for guidance.
        guidance_scale: w in `u + w * (c - u)`; 1 follows the conditional output alone.
        guidance_rescale: how much of the conditional output's deviation to restore, 0 to 1.
        guidance_interval: guide only at timesteps within these two; elsewhere one call is saved.
        latents: `[B, ...]` at the first timestep, in place of drawn noise.
        state: go on from here instead; the scheduler has the same timesteps.
        on_step: called after every step, to store its argument or to look at it.
        dtype, device: of the samples; the device is that of `latents`, `state`, `sample_ids` or
            `conditions` by default, else the CPU.
        progress: show a progress bar.

    Returns:
        `[B, ...]`.

    Raises:
        ValueError: no timesteps, shapes that do not fit, guidance without `unconditional`, a state
            that lies outside of the schedule.
    """
    shape = tuple(shape)
    conditions, unconditional = dict(conditions or {}), dict(unconditional or {})
    where = _device(device, latents, state, sample_ids, conditions)
    _check_conditions(shape, conditions, unconditional)
    if guidance_scale != 1 and not unconditional:
        raise ValueError(f"guidance_scale needs unconditional, got {guidance_scale} and none")
    check_sample_ids(sample_ids, shape[0], where)
    if num_inference_steps is not None:
        scheduler.set_timesteps(num_inference_steps, device=where)  # type: ignore[attr-defined]
    scheduler.begin_loop()
    calls = len(scheduler.timesteps)
    if state is None:
        x = _first(scheduler, shape, latents, seed, sample_ids, dtype, where)
        begin = 0
    else:
        x, begin = state.sample, state.step
        if x.shape != shape or not 0 <= begin <= calls:
            raise ValueError(
                f"state must have a sample {list(shape)} and a step of 0 to {calls}, "
                f"got {list(x.shape)} and {begin}"
            )
        scheduler.resume_loop(begin, state.memory)

    times = scheduler.timesteps.tolist() if guidance_interval is not None else []
    batched = shape[:1]
    both = {name: torch.cat([conditions[name], unconditional[name]]) for name in unconditional}
    for step in progress_bar(range(begin, calls), "sampling", show=progress):
        t = scheduler.timesteps[step]
        guided = guidance_scale != 1 and (
            guidance_interval is None or guidance_interval[0] <= times[step] <= guidance_interval[1]
        )
        inputs = scheduler.scale_model_input(x, t)
        if guided:
            doubled = torch.cat([inputs, inputs])
            output, uncond = _output(model(doubled, t.expand(2 * shape[0]), **both)).chunk(2)
            options: dict[str, Any] = {
                "uncond_output": uncond,
                "guidance_scale": guidance_scale,
                "guidance_rescale": guidance_rescale,
            }
        else:
            output = _output(model(inputs, t.expand(batched), **conditions))
            options = {}
        x = scheduler.next_sample(x, output, step, seed=seed, sample_ids=sample_ids, **options)
        if on_step is not None:
            on_step(SamplingState(step + 1, x, scheduler.memory()))
    return x


def _first(
    scheduler: Scheduler,
    shape: tuple[int, ...],
    latents: Tensor | None,
    seed: int | Tensor,
    sample_ids: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if latents is not None:
        if latents.shape != shape:
            raise ValueError(f"latents must be {list(shape)}, got {list(latents.shape)}")
        return latents
    noise = normal_noise(shape, seed=seed, sample_ids=sample_ids, dtype=dtype, device=device)
    scale = scheduler.init_noise_sigma
    return noise if isinstance(scale, float) and scale == 1 else noise * float(scale)


def _device(
    device: torch.device | str | None,
    latents: Tensor | None,
    state: SamplingState | None,
    sample_ids: Tensor | None,
    conditions: Mapping[str, Tensor],
) -> torch.device:
    if device is not None:
        return torch.device(device)
    tensors = [latents, None if state is None else state.sample, sample_ids, *conditions.values()]
    return next((t.device for t in tensors if t is not None), torch.device("cpu"))


def _check_conditions(
    shape: tuple[int, ...], conditions: Mapping[str, Tensor], unconditional: Mapping[str, Tensor]
) -> None:
    if unconditional and set(unconditional) != set(conditions):
        raise ValueError(
            f"unconditional must have the keys of conditions, {sorted(conditions)}, "
            f"got {sorted(unconditional)}"
        )
    for name, value in (*conditions.items(), *unconditional.items()):
        if value.dim() == 0 or value.shape[0] != shape[0]:
            raise ValueError(f"{name} must be [{shape[0]}, ...], got {list(value.shape)}")


def _output(returned: Any) -> Tensor:
    output = getattr(returned, "sample", returned)
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor, got {type(returned).__name__}")
    return output
