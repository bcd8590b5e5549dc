from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.reference.normal_noise import normal_noise


def diffuse(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    target: str,
) -> tuple[Tensor, Tensor]:
    """`alpha` and `sigma` have the shape of x0's first dimensions."""
    wide = torch.promote_types(x0.dtype, torch.float32)
    a, s = by_element(alpha, x0).to(wide), by_element(sigma, x0).to(wide)  # [B, ..., 1, ...]
    z = drawn(x0, noise, key, sample_ids).to(wide)  # [B, ...]
    data = x0.to(wide)
    return (a * data + s * z).to(x0.dtype), target_of(target, data, z, a, s).to(x0.dtype)


def diffuse_backward(
    grad_x_t: Tensor,
    grad_target: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    target: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x0, alpha, sigma and the noise; empty for a noise that was drawn."""
    wide = torch.promote_types(x0.dtype, torch.float32)
    a, s = by_element(alpha, x0).to(wide), by_element(sigma, x0).to(wide)
    gx, gt, data = grad_x_t.to(wide), grad_target.to(wide), x0.to(wide)
    z = drawn(x0, noise, key, sample_ids).to(wide)
    by_x0 = a * gx + {"epsilon": 0 * gt, "sample": gt, "v": -s * gt, "flow": -gt}[target]
    by_z = s * gx + {"epsilon": gt, "sample": 0 * gt, "v": a * gt, "flow": gt}[target]
    with_v = gt if target == "v" else torch.zeros_like(gt)
    by_alpha, by_sigma = gx * data + with_v * z, gx * z - with_v * data  # [B, ...]
    inner = tuple(range(alpha.dim(), x0.dim()))
    return (
        by_x0.to(x0.dtype),
        (by_alpha.sum(inner) if inner else by_alpha).to(alpha.dtype),
        (by_sigma.sum(inner) if inner else by_sigma).to(sigma.dtype),
        x0.new_empty(0) if noise is None else by_z.to(noise.dtype),
    )


def target_of(target: str, data: Tensor, z: Tensor, a: Tensor, s: Tensor) -> Tensor:
    if target == "v":
        return a * z - s * data
    return {"epsilon": z, "sample": data, "flow": z - data}[target]


def by_element(level: Tensor, x: Tensor) -> Tensor:
    """A level `[B, ...]` with ones behind, to go with every element of x."""
    return level.reshape(level.shape + (1,) * (x.dim() - level.dim()))


def drawn(x: Tensor, noise: Tensor | None, key: Tensor | None, sample_ids: Tensor | None) -> Tensor:
    if noise is not None:
        return noise
    assert key is not None
    return normal_noise(x.shape, key, sample_ids, torch.float32)
