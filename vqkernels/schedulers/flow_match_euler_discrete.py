"""Euler steps along a rectified flow. Liu et al. 2022, arXiv:2209.03003."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice, check_tensor
from vqkernels.ops.denoise_step import COLUMNS, denoise_step
from vqkernels.schedulers._config import configured
from vqkernels.schedulers._flow import FlowScheduler
from vqkernels.schedulers._noise import Generators
from vqkernels.schedulers._scheduler import SchedulerOutput
from vqkernels.schedulers._sigmas import (
    Levels,
    given_levels,
    respaced_like,
    respacing_of,
    shift_sigmas,
    stretch_to_terminal,
    time_shift,
)


@dataclass
class FlowMatchEulerDiscreteSchedulerOutput(SchedulerOutput):
    pass


class FlowMatchEulerDiscreteScheduler(FlowScheduler):
    """Deterministic sampling, or stochastic with `stochastic_sampling`.

    With s = sigma at a step and s' at the next one:

        prev_sample = sample + (s' - s) model_output
        prev_sample = (1 - s') (sample - s model_output) + s' z            (stochastic_sampling)

    Args:
        num_train_timesteps .. stochastic_sampling: as in diffusers; docs/schedulers.md lists
            them. base_shift, max_shift, base_image_seq_len and max_image_seq_len are read by
            pipelines, which compute `mu` from them.
        numerics: "exact", or "diffusers" for its order of operations and roundings.
        compat: names of faults of diffusers to reproduce; by default none under "exact", all
            under "diffusers".

    Raises:
        ImportError: `use_beta_sigmas` without scipy.
        ValueError: an argument that does not fit.
    """

    _defaults: ClassVar[dict[str, Any]] = {}

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        check_choice("time_shift_type", time_shift_type, ("exponential", "linear"))
        if shift_terminal and not 0 < shift_terminal < 1:
            raise ValueError(f"shift_terminal must lie in (0, 1), got {shift_terminal}")
        self._respacing = respacing_of(self.config)
        self._shift = shift
        self._set_flow(None if use_dynamic_shifting else shift)

    @property
    def shift(self) -> float:
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Use this shift from the next `set_timesteps` on.

        Raises:
            ValueError: a shift that is not positive.
        """
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self._shift = shift

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """m / (m + (1 / t - 1)^sigma), m = exp(mu) or mu as `time_shift_type` says."""
        return time_shift(self.config.time_shift_type, mu, t, sigma)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Times stretched about 1, so that the last is the config's `shift_terminal`."""
        return stretch_to_terminal(t, self.config.shift_terminal)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Lay out so many model calls, or one at each of these levels or timesteps.

        Args:
            num_inference_steps: the number of model calls; may be left out with the others.
            sigmas: levels in [0, 1], descending, without the end; they are shifted.
            mu: the shift under `use_dynamic_shifting`, not used otherwise.
            timesteps: what the model sees, in [0, num_train_timesteps], descending. Without
                `sigmas` they tell those too, which are shifted while the timesteps are not.

        Raises:
            ValueError: nothing to go by; lengths that differ; values that do not fit;
                `use_dynamic_shifting` without `mu`.
        """
        config = self.config
        if config.use_dynamic_shifting and mu is None:
            raise ValueError("mu must be given with use_dynamic_shifting=True, got None")
        times = None if timesteps is None else given_levels("timesteps", timesteps, self._precision)
        levels = None if sigmas is None else given_levels("sigmas", sigmas, self._precision)
        lengths = {
            "num_inference_steps": num_inference_steps,
            "sigmas": None if levels is None else len(levels),
            "timesteps": None if times is None else len(times),
        }
        given = {name: length for name, length in lengths.items() if length is not None}
        if not given:
            raise ValueError(f"give one of {', '.join(lengths)}, got none")
        if len(set(given.values())) > 1:
            raise ValueError(f"{' and '.join(given)} must agree in length, got {given}")
        if levels is None:
            spaced = self._even_times(num_inference_steps) if times is None else times
            levels = spaced / config.num_train_timesteps
        levels = self._shifted(levels, mu)
        if self._respacing:
            levels = respaced_like(config, self._respacing, levels, len(levels))

        flow = torch.from_numpy(levels).to(self._dtype)
        shown = flow * config.num_train_timesteps
        if times is not None:
            shown = torch.from_numpy(times)
        end = torch.zeros_like(flow[:1])
        if config.invert_sigmas:
            flow, end = 1.0 - flow, torch.ones_like(end)
            shown = flow * config.num_train_timesteps
        self.num_inference_steps = len(flow)
        self._set_sigmas(torch.cat([flow, end]).numpy())
        self.sigmas = self.sigmas.to(device)
        self._sigmas_on(self.sigmas.device)  # for steps of tokens
        self._lay_out(shown.float(), device)

    def _shifted(self, levels: Levels, mu: float | None) -> Levels:
        if self.config.use_dynamic_shifting:
            assert mu is not None
            with np.errstate(divide="ignore"):  # a level of 0 stays 0
                levels = self.time_shift(mu, 1.0, levels)
        else:
            levels = shift_sigmas(levels, self.shift)
        if not self.config.shift_terminal:
            return levels
        if levels[-1] == 1 and "shift_terminal_nan" not in self.compat:
            return levels  # nothing but noise: no stretch moves it
        with np.errstate(invalid="ignore"):
            return stretch_to_terminal(levels, self.config.shift_terminal)

    def _columns(self, **options: Any) -> dict[str, Tensor | float]:
        steps = len(self._values)
        return self._flow_columns(self._sigmas[:steps], self._sigmas[1 : steps + 1])

    def _flow_columns(self, sigma: Tensor, following: Tensor) -> dict[str, Tensor | float]:
        columns: dict[str, Tensor | float] = {"prediction_sample": 1.0, "prediction_output": -sigma}
        if self.config.stochastic_sampling:
            kept = 1 - following
            step = {"prev_sample": kept, "prev_output": -kept * sigma, "prev_noise": following}
            return {**columns, **step}
        return {**columns, "prev_sample": 1.0, "prev_output": following - sigma}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The sample at the next level.

        Args:
            model_output, sample: `[B, ...]`.
            timestep: one of `timesteps`, not its number. It tells the first step of a loop; later
                ones follow in order.
            s_churn, s_tmin, s_tmax, s_noise: without effect in diffusers; here s_churn must be 0.
            generator: draws the noise of `stochastic_sampling` as in diffusers; or one a sample.
            per_token_timesteps: `[B, N]` for samples `[B, N, D]`, each token's own timestep. A
                token goes to the next lower level of the schedule by
                `sample + (s - s') model_output`: the other sign than above, as in diffusers,
                whose pipelines hand over the negative output.
            return_dict: a FlowMatchEulerDiscreteSchedulerOutput, else `(prev_sample,)`.
            seed, sample_ids: key the noise by sample and step instead, `vqkernels.normal_noise`
                with stream 1 and step = row of the schedule; it is drawn inside the step.
            uncond_output, guidance_scale, guidance_rescale: classifier-free guidance in the same
                pass, `model_output` being the conditional one; numbers, or one value a sample.
                arXiv:2207.12598, arXiv:2305.08891.

        Raises:
            ValueError: no `set_timesteps` before, an integer timestep or one outside of the
                schedule, both `generator` and `seed`, guidance with `per_token_timesteps`.
        """
        self._check_timestep(timestep)
        self._check_exact(uncond_output=uncond_output)
        if s_churn != 0:
            raise ValueError(f"s_churn must be 0: a flow's Euler step has no churn, got {s_churn}")
        row = self._next_row(timestep)
        noise: dict[str, Any] = {}
        if self.config.stochastic_sampling:
            noise = self._noise(
                sample,
                row,
                generator=generator,
                seed=seed,
                sample_ids=sample_ids,
                dtype=torch.float32,
            )
        guidance = {
            "uncond_output": uncond_output,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
        }
        if self.numerics == "diffusers":
            previous = self._step_as_diffusers(
                model_output, row, sample, per_token_timesteps, noise.get("noise")
            )
        elif per_token_timesteps is not None:
            if uncond_output is not None:
                raise ValueError("uncond_output must be None with per_token_timesteps")
            if "seed" in noise:  # the op would key it by the token's row
                noise = {"noise": self._keyed(sample, self._rows[row], **noise)}
            previous = self._step_of_tokens(model_output, sample, per_token_timesteps, **noise)
        else:
            previous, _ = self._advance(
                sample, model_output, row, want_prediction=False, **guidance, **noise
            )
        self._step_index = row + 1
        return FlowMatchEulerDiscreteSchedulerOutput(previous) if return_dict else (previous,)

    def _step_of_tokens(
        self, model_output: Tensor, sample: Tensor, timesteps: Tensor, **noise: Any
    ) -> Tensor:
        check_tensor("per_token_timesteps", timesteps)
        sigma = timesteps.to(sample.device, torch.float64) / self.config.num_train_timesteps
        levels = self._sigmas_on(sample.device)
        below = levels < sigma.unsqueeze(-1) - 1e-6
        following = torch.where(below, levels, 0).amax(-1)
        if not self.config.stochastic_sampling:  # the other sign, see `step`
            sigma, following = following, sigma
        columns = self._flow_columns(sigma.flatten(), following.flatten())
        table = torch.zeros(sigma.numel(), len(COLUMNS), dtype=torch.float64, device=sample.device)
        for name, value in {"guidance": 1.0, "clip": math.inf, **columns}.items():
            table[:, COLUMNS.index(name)] = value
        index = torch.arange(len(table), device=sample.device).view(sigma.shape)
        return denoise_step(sample, model_output, table.float(), index=index, **noise).prev_sample

    def _step_as_diffusers(
        self,
        model_output: Tensor,
        row: int,
        sample: Tensor,
        per_token: Tensor | None,
        noise: Tensor | None,
    ) -> Tensor:
        sample = sample.to(torch.float32)
        if per_token is None:
            sigma, following = self.sigmas[row], self.sigmas[row + 1]
            change = following - sigma
        else:
            tokens = per_token / self.config.num_train_timesteps
            levels = self.sigmas[:, None, None]
            below, _ = ((levels < tokens[None] - 1e-6) * levels).max(dim=0)
            sigma, following = tokens[..., None], below[..., None]
            change = sigma - following
        if noise is None:
            previous = sample + change * model_output
        else:
            data = sample - sigma * model_output
            previous = (1.0 - following) * data + following * noise
        return previous if per_token is not None else previous.to(model_output.dtype)
