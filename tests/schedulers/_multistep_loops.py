"""Whole loops of the multistep schedulers over a fixed model whose output feeds back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from _peers import float64_for_float32
from torch import Tensor

from vqkernels.schedulers._compat import FAULTS

STEP_COUNTS = (1, 2, 3, 7, 50)
SHAPE = (3, 4, 5, 3)
ALL = tuple(FAULTS)


def model(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear, mixes its input, knows the time; of the sample's dtype."""
    time = t.to(x.dtype) / 1000
    return 0.6 * torch.tanh(x.roll(1, -1) + 0.5 * x + time) + 0.3 * x * torch.cos(3 * time)


_START = torch.randn(SHAPE, generator=torch.Generator().manual_seed(11))


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return _START.to(dtype)


def noises(steps: int) -> list[Tensor]:
    return list(torch.randn((steps, *SHAPE), generator=torch.Generator().manual_seed(12)))


def run(
    scheduler: Any,
    steps: int | None,
    *,
    dtype: torch.dtype = torch.float32,
    layout: dict[str, Any] | None = None,
    timesteps: Tensor | None = None,
    noise: Sequence[Tensor] | None = None,
    call: Callable[[Tensor, Tensor], Tensor] = model,
    stop: int | None = None,
    **arguments: Any,
) -> Tensor:
    """The end of a loop; `layout` goes to set_timesteps, `arguments` to every step."""
    scheduler.set_timesteps(steps, **(layout or {}))
    if timesteps is not None:
        scheduler.timesteps = timesteps
    x = start(dtype)
    for i, t in enumerate(scheduler.timesteps[:stop]):
        if noise is not None:
            arguments["variance_noise"] = noise[i]
        x = scheduler.step(call(x, t), t, x, **arguments).prev_sample
    return x


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def check_loops(
    ours: Any,
    theirs: Any,
    config: dict[str, Any],
    *,
    counts: Sequence[int | None] = STEP_COUNTS,
    layout: dict[str, Any] | None = None,
    stochastic: bool = False,
    fixed: Sequence[str] = (),
) -> None:
    """Ours under numerics="diffusers" is theirs bit for bit; exact ours, with all of diffusers'
    faults, is within 1e-5 of theirs in float64, and of theirs in float32 where that is so itself.
    So it is without the faults `fixed`.
    """
    for steps in counts:
        peer = theirs(**config)
        draws = {"noise": noises(1 + (steps or 20))} if stochastic else {}
        expected = run(peer, steps, layout=layout, **draws)
        assert expected.isfinite().all()

        same = ours(**config, numerics="diffusers")
        assert torch.equal(run(same, steps, layout=layout, **draws), expected), steps
        assert torch.equal(same.timesteps, peer.timesteps)
        assert torch.equal(same.sigmas, peer.sigmas)

        arguments = {"dtype": torch.float64, "layout": layout, "timesteps": peer.timesteps}
        with float64_for_float32():
            wide = theirs(**config)
            truth = run(wide, steps, **arguments, **draws)
        for compat in {ALL, tuple(fault for fault in ALL if fault not in fixed)}:
            exact = ours(**config, compat=compat)
            result = run(exact, steps, layout=layout, **draws)
            assert result.dtype == torch.float32
            assert torch.equal(exact.timesteps, peer.timesteps)
            assert exact.sigmas.dtype == peer.sigmas.dtype
            assert (exact.sigmas.double() - wide.sigmas).abs().max() <= 1e-7 * wide.sigmas.max()
            assert error(result, truth) <= 1e-5, steps
            if error(expected, truth) <= 5e-6:
                assert error(result, expected) <= 1e-5, steps
