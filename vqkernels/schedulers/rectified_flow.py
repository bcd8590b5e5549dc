"""Sampling a rectified flow.

The model predicts the velocity v = z - x of the straight path x_t = (1 - t) x + t z from data x
to noise z. A sample is the solution at t = 0 of dx_t / dt = v(x_t, t) from noise at t = 1.
Source: Liu et al. 2022, arXiv:2209.03003; guidance: Ho & Salimans 2022, arXiv:2207.12598.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels._optional import progress_bar
from vqkernels.models.dit import DiT

TIME_SCALE = 1000.0  # models see t * TIME_SCALE, the range that timestep embeddings are made for


@torch.no_grad()
def euler_sample(
    model: DiT,
    noise: Tensor,
    labels: Tensor,
    *,
    steps: int = 25,
    guidance: float = 2.0,
    progress: bool = False,
) -> Tensor:
    """Integrate from noise to data in equal Euler steps, guided towards the labels.

    Args:
        model: predicts velocities; it is put in eval mode for the call.
        noise: x_t at t = 1, `[B, C, H, W]`. Per-sample reproducible noise is
            `normal_noise((B, C, H, W), seed=seed)`.
        labels: int64 classes `[B]`.
        steps: number of model evaluations.
        guidance: 1 follows the conditional velocity c, above it `u + guidance * (c - u)` with
            the unconditional velocity u (two evaluations in one batch). Needs a model trained
            with label dropout.
        progress: show a progress bar.

    Returns:
        Samples `[B, C, H, W]`.

    Raises:
        ValueError: `steps` below 1, labels that do not fit, or guidance without label dropout.
    """
    _check(model, noise, labels, steps, guidance)
    was_training = model.training
    model.eval()
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    x = noise
    for step in progress_bar(range(steps), "sampling", show=progress):
        velocity = _velocity(model, x, times[step], labels, guidance)
        x = x + (times[step + 1] - times[step]) * velocity
    model.train(was_training)
    return x


def _velocity(model: DiT, x: Tensor, time: float, labels: Tensor, guidance: float) -> Tensor:
    t = torch.full((len(x),), time * TIME_SCALE, device=x.device)
    if guidance == 1:
        return model(x, t, labels)
    no_class = torch.full_like(labels, model.num_classes)
    both = model.forward_with_cfg(
        torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, no_class]), guidance
    )
    return both[: len(x)]


def _check(model: DiT, noise: Tensor, labels: Tensor, steps: int, guidance: float) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if labels.shape != noise.shape[:1]:
        raise ValueError(f"labels must be [{len(noise)}], got shape {list(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= model.num_classes:
        raise ValueError(
            f"labels must lie in [0, {model.num_classes}], got values from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    if guidance != 1 and model.y_embedder.dropout_prob == 0:
        raise ValueError(f"guidance must be 1 for a model without label dropout, got {guidance}")
    if model.learn_sigma:
        raise ValueError("model must predict velocities alone: build it with learn_sigma=False")
