"""Whole loops of the multistep schedulers over a fixed model whose output feeds back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STEP_COUNTS = (1, 2, 3, 7, 50)
SHAPE = (3, 4, 5, 3)


def model(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear, mixes its input, knows the time; of the sample's dtype."""
    time = t.to(x.dtype) / 1000
    return 0.6 * torch.tanh(x.roll(1, -1) + 0.5 * x + time) + 0.3 * x * torch.cos(3 * time)


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(11)).to(dtype)


def run(
    scheduler: Any,
    steps: int | None,
    *,
    dtype: torch.dtype = torch.float32,
    layout: dict[str, Any] | None = None,
    timesteps: Tensor | None = None,
    call: Callable[[Tensor, Tensor], Tensor] = model,
    **arguments: Any,
) -> Tensor:
    """The end of a loop; `layout` goes to set_timesteps, `arguments` to every step."""
    scheduler.set_timesteps(steps, **(layout or {}))
    if timesteps is not None:
        scheduler.timesteps = timesteps
    x = start(dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(call(x, t), t, x, **arguments).prev_sample
    return x


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
