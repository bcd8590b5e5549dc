"""What the scheduler tests share: a toy model, whole loops, diffusers in float32 and in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

BOUND = 1e-5  # of the largest magnitude, over a whole loop


def toy_model(x: Tensor, t: Tensor | float, channels: int = 1) -> Tensor:
    """Nonlinear, mixes neighbours, depends on t: an error made in one step acts on all later."""
    level = torch.as_tensor(t, dtype=torch.float64).item() / 1000
    mixed = 0.9 * x + 0.2 * x.roll(1, -1) - 0.1 * x.flip(1)
    output = torch.tanh(mixed + 0.3 * level)
    return torch.cat([output] * channels, dim=1) if channels > 1 else output


def start(shape: tuple[int, ...] = (2, 3, 8, 8), seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop(scheduler: Any, x: Tensor, model: Any = toy_model, **options: Any) -> Tensor:
    """All steps of a schedule, as a pipeline runs them."""
    scaled = getattr(
        scheduler, "scale_model_input", lambda sample, t: sample
    )  # not diffusers' flows
    for t in scheduler.timesteps:
        output = model(scaled(x, t), t)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


@contextmanager
def float64_for_float32() -> Iterator[None]:
    """Inside, code that asks for float32 gets float64: diffusers' own equations, unrounded."""
    default = torch.get_default_dtype()
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(np, "float32", np.float64),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    scale = theirs.double().abs().max()
    return float((ours.double() - theirs.double()).abs().max() / scale)


def assert_follows(ours: Tensor, theirs: Tensor, theirs_in_float64: Tensor) -> None:
    """Ours is within the bound of diffusers; or of its equations in float64, where its float32
    is further from them than ours."""
    if distance(ours, theirs) <= BOUND:
        return
    error, their_error = distance(ours, theirs_in_float64), distance(theirs, theirs_in_float64)
    assert error <= BOUND, f"{error:.2e} from float64, diffusers' float32 {their_error:.2e}"
    assert error < their_error
