"""What the scheduler tests share: a toy model, whole loops, diffusers in float32 and in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BOUND = 1e-5  # of the largest magnitude, over a whole loop
STEPS = (1, 2, 3, 7, 50)


def toy_model(x: Tensor, t: Tensor | float, channels: int = 1) -> Tensor:
    """Nonlinear, mixes neighbours, depends on t: an error made in one step acts on all later.

    `channels=2` appends a second half, as models of a learned variance do: values in (0, 1).
    """
    level = torch.as_tensor(t, dtype=torch.float64).item() / 1000
    mixed = 0.9 * x + 0.2 * x.roll(1, -1) - 0.1 * x.flip(1)
    output = torch.tanh(mixed + 0.3 * level)
    return torch.cat([output, torch.sigmoid(mixed - level)], dim=1) if channels == 2 else output


def start(shape: tuple[int, ...] = (2, 3, 8, 8), seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop(
    scheduler: Any, x: Tensor, model: Callable[..., Tensor] = toy_model, **options: Any
) -> Tensor:
    """All steps of a schedule, as a pipeline runs them."""
    scaled = getattr(
        scheduler, "scale_model_input", lambda sample, t: sample
    )  # not diffusers' flows
    for t in scheduler.timesteps:
        output = model(scaled(x, t), t)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


@contextmanager
def rounded_normals() -> Iterator[None]:
    """Inside, a generator gives float64 tensors the normals that it gives float32 ones."""
    randn = torch.randn

    def rounded(*shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return randn(*shape, dtype=_FLOAT32, **options).to(dtype or torch.get_default_dtype())

    with mock.patch.object(torch, "randn", rounded):
        yield


_FLOAT32 = torch.float32


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


def compare(
    ours: type,
    theirs: type,
    arguments: dict[str, Any],
    run: Callable[[Any, Tensor], Tensor],
    x: Tensor | None = None,
) -> None:
    """Both classes, both numerics of ours, over what `run(scheduler, x)` does.

    Ours reproduces all faults, since that is what the peer has.
    """
    from vqkernels.schedulers._compat import FAULTS

    x = start() if x is None else x
    expected = run(theirs(**arguments), x)
    with float64_for_float32(), rounded_normals():
        unrounded = run(theirs(**arguments), x.double())
    assert unrounded.dtype == torch.float64
    found = run(ours(**arguments, compat=tuple(FAULTS)), x)
    assert found.dtype == x.dtype
    assert_follows(found, expected, unrounded)
    assert torch.equal(run(ours(**arguments, numerics="diffusers"), x), expected)


class NoReads(TorchDispatchMode):
    """Raises where the host reads a tensor's value, waits for it, moves it, or copies a number of
    its own to a device."""

    forbidden = (
        *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"),
        *("_to_copy", "lift_fresh", "lift_fresh_copy"),
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.forbidden, f"{name} in a step"
        return func(*args, **(kwargs or {}))
