"""Whole loops of a scheduler on levels beside diffusers': its roundings, and exact coefficients."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from _peers import assert_follows, float64_for_float32, generator, loop, rounded_normals, start
from torch import Tensor

from vqkernels import schedulers
from vqkernels.schedulers._compat import FAULTS

ALL_FAULTS = tuple(FAULTS)


def theirs(name: str, config: dict[str, Any], *, laid_out: bool = True, **schedule: Any) -> Any:
    scheduler = getattr(diffusers, name)(**config)
    if laid_out:
        scheduler.set_timesteps(**schedule)
    return scheduler


def ours(
    name: str,
    config: dict[str, Any],
    *,
    numerics: str = "exact",
    compat: tuple[str, ...] | None = None,
    laid_out: bool = True,
    **schedule: Any,
) -> Any:
    scheduler = getattr(schedulers, name)(**config, numerics=numerics, compat=compat)
    if laid_out:
        scheduler.set_timesteps(**schedule)
    return scheduler


def run(scheduler: Any, x: Tensor, *, seeded: bool = False, **options: Any) -> Tensor:
    """A loop whose noise, if it has any, comes from a generator of its own."""
    if seeded:
        options["generator"] = generator(3)
    return loop(scheduler, x, **options)


def in_float64(
    name: str, config: dict[str, Any], schedule: dict[str, Any], x: Tensor, **options: Any
) -> tuple[Any, Tensor]:
    """diffusers' scheduler and loop in float64, on the noise that it draws in float32."""
    with float64_for_float32(), rounded_normals():
        peer = theirs(name, config, **schedule)
        return peer, run(peer, x.double(), **options)


def assert_is_diffusers(
    name: str,
    config: dict[str, Any],
    schedule: dict[str, Any] | int,
    *,
    shape: tuple[int, ...] = (2, 3, 8, 8),
    **options: Any,
) -> None:
    """numerics="diffusers" is diffusers bit for bit; exact coefficients, with its faults, are
    within the bound of it or of its equations in float64."""
    if isinstance(schedule, int):
        schedule = {"num_inference_steps": schedule}
    peer = theirs(name, config, **schedule)
    rounded = ours(name, config, numerics="diffusers", **schedule)
    exact = ours(name, config, compat=ALL_FAULTS, **schedule)

    assert rounded.timesteps.dtype == exact.timesteps.dtype == peer.timesteps.dtype
    assert torch.equal(rounded.timesteps, peer.timesteps)
    assert torch.equal(rounded.sigmas, peer.sigmas)
    assert exact.sigmas.dtype == peer.sigmas.dtype
    assert rounded.num_inference_steps == exact.num_inference_steps
    x = start(shape)
    if hasattr(peer, "init_noise_sigma"):
        assert float(rounded.init_noise_sigma) == float(peer.init_noise_sigma)
        x = x * float(peer.init_noise_sigma)
    expected = run(peer, x, **options)
    torch.testing.assert_close(run(rounded, x, **options), expected, rtol=0, atol=0, equal_nan=True)
    result = run(exact, x, **options)
    assert result.dtype == x.dtype
    peer, unrounded = in_float64(name, config, schedule, x, **options)
    for mine, its in ((exact.timesteps, peer.timesteps), (exact.sigmas, peer.sigmas)):
        torch.testing.assert_close(mine, its.float(), rtol=1e-6, atol=0)
    assert_follows(result, expected, unrounded)
