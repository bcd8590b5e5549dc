"""The multistep solvers in diffusers' order of operations, dtypes and roundings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Around(NamedTuple):
    """Float32 scalars of the level that a step goes to, of where it is, of the steps before."""

    alphas: list[Tensor]
    sigmas: list[Tensor]
    lambdas: list[Tensor]


def differences(around: Around, predictions: Sequence[Tensor], order: int) -> list[Tensor]:
    """Of predictions, newest first: that one, then its first and second difference quotient."""
    lambdas = around.lambdas
    if order == 1:
        return [predictions[0]]
    h = lambdas[0] - lambdas[1]
    ratio = (lambdas[1] - lambdas[2]) / h
    near = (1.0 / ratio) * (predictions[0] - predictions[1])
    if order == 2:
        return [predictions[0], near]
    ratio_before = (lambdas[2] - lambdas[3]) / h
    far = (1.0 / ratio_before) * (predictions[1] - predictions[2])
    bend = near - far
    spread = ratio + ratio_before
    return [predictions[0], near + (ratio / spread) * bend, (1.0 / spread) * bend]


def dpm_solver_weights(
    algorithm: str,
    solver: str,
    order: int,
    around: Around,
    sde_sign: float,
) -> list[Tensor]:
    """Of the sample, of `differences`, and for an SDE of the noise; the order they are added in."""
    alphas, sigmas, lambdas = around
    alpha, sigma, h = alphas[0], sigmas[0], lambdas[0] - lambdas[1]
    if algorithm == "dpmsolver++":
        e = torch.exp(-h)
        kept, first = sigma / sigmas[1], -(alpha * (e - 1.0))
        half = -(0.5 * (alpha * (e - 1.0)))
        second = alpha * ((e - 1.0) / h + 1.0)
        third = -(alpha * ((e - 1.0 + h) / h**2 - 0.5))
    elif algorithm == "dpmsolver":
        e = torch.exp(h)
        kept, first = alpha / alphas[1], -(sigma * (e - 1.0))
        half = -(0.5 * (sigma * (e - 1.0)))
        second = -(sigma * ((e - 1.0) / h - 1.0))
        third = -(sigma * ((e - 1.0 - h) / h**2 - 0.5))
    elif algorithm == "sde-dpmsolver++":
        e = torch.exp(-2.0 * h)
        kept, first = sigma / sigmas[1] * torch.exp(-h), alpha * (1.0 - e)
        half = 0.5 * (alpha * (1.0 - e))
        second = alpha * ((1.0 - e) / (-2.0 * h) + 1.0)
        third = alpha * ((1.0 - e - 2.0 * h) / (2.0 * h) ** 2 + 0.5 * sde_sign)
        noise = sigma * torch.sqrt(1.0 - e)
    else:
        e = torch.exp(h)
        kept, first = alpha / alphas[1], -(2.0 * (sigma * (e - 1.0)))
        half = -(sigma * (e - 1.0))
        second = -(2.0 * (sigma * ((e - 1.0) / h - 1.0)))
        noise = sigma * torch.sqrt(torch.exp(2 * h) - 1.0)
    weights = [kept, first]
    if order == 2:
        weights.append(half if solver == "midpoint" else second)
    elif order == 3:
        weights += [second, third]
    return [*weights, noise] if algorithm.startswith("sde") else weights


def weighted(weights: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term
    return total


def unipc(
    x: Tensor,
    newest: Tensor | None,
    predictions: Sequence[Tensor],
    around: Around,
    solver: str,
    order: int,
    data: bool,
) -> Tensor:
    """UniP from x, the sample at the second level, or UniC given the prediction at the first.

    Args:
        newest: the prediction at the first level: turns the predictor into the corrector.
        predictions: those at the second level and before.
    """
    alphas, sigmas, lambdas = around
    h = lambdas[0] - lambdas[1]
    ratios = [(lambdas[k] - lambdas[1]) / h for k in range(2, order + 1)]
    slopes = [
        (earlier - predictions[0]) / ratio
        for earlier, ratio in zip(predictions[1:], ratios, strict=False)
    ]
    z = -h if data else h
    growth = torch.expm1(z)
    b = z if solver == "bh1" else growth
    kept, scale = (sigmas[0] / sigmas[1], alphas[0]) if data else (alphas[0] / alphas[1], sigmas[0])
    moved = kept * x - scale * growth * predictions[0]

    bend: Tensor | float = 0
    if newest is None:
        if slopes:
            half = torch.ones(1, dtype=x.dtype, device=x.device) * 0.5
            rho = half if order == 2 else _solve(ratios, growth, z, b, order - 1, x)
            bend = torch.einsum("k,bkc...->bc...", rho, torch.stack(slopes, dim=1))
        return (moved - scale * b * bend).to(x.dtype)
    if order == 1:
        rho = torch.ones(1, dtype=x.dtype, device=x.device) * 0.5
    else:
        rho = _solve(ratios, growth, z, b, order, x)
        bend = torch.einsum("k,bkc...->bc...", rho[:-1], torch.stack(slopes, dim=1))
    change = newest - predictions[0]
    return (moved - scale * b * (bend + rho[-1] * change)).to(x.dtype)


def _solve(
    ratios: Sequence[Tensor], growth: Tensor, z: Tensor, b: Tensor, size: int, x: Tensor
) -> Tensor:
    """The weights of the slopes: the first `size` of the moment equations."""
    points = torch.stack([*ratios, torch.ones((), device=z.device)])[:size]
    powers = torch.stack([torch.pow(points, k) for k in range(size)])
    moments, rest = [], growth / z - 1
    for k in range(1, size + 1):
        moments.append(rest * math.factorial(k) / b)
        rest = rest / z - 1 / math.factorial(k + 1)
    return torch.linalg.solve(powers, torch.stack(moments)).to(x.device).to(x.dtype)
