from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.reference.diffuse import by_element, drawn, target_of


def diffusion_loss(
    model_output: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    weight: Tensor | None,
    delta: Tensor | None,
    target: str,
    loss: str,
) -> Tensor:
    """`alpha`, `sigma`, `weight` and `delta` have the shape of x0's first dimensions."""
    difference, d = _difference(
        model_output, x0, alpha, sigma, noise, key, sample_ids, delta, target
    )
    if loss == "mse":
        each = difference.square()
    elif loss == "huber":
        size = difference.abs()
        each = torch.where(size <= d, difference.square() / 2, d * (size - d / 2))
    else:
        each = 2 * d * ((difference.square() + d.square()).sqrt() - d)
    inner = tuple(range(alpha.dim(), x0.dim()))
    losses = each.mean(inner) if inner else each
    return losses if weight is None else losses * weight


def diffusion_loss_backward(
    grad: Tensor,
    model_output: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    weight: Tensor | None,
    delta: Tensor | None,
    target: str,
    loss: str,
    needs_x0: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of model_output and, where wanted, of x0, which the target depends on."""
    difference, d = _difference(
        model_output, x0, alpha, sigma, noise, key, sample_ids, delta, target
    )
    if loss == "mse":
        slope = 2 * difference
    elif loss == "huber":
        slope = torch.maximum(torch.minimum(difference, d), -d)
    else:
        slope = 2 * d * difference / (difference.square() + d.square()).sqrt()
    inner = max(1, x0.numel() // max(1, alpha.numel()))
    scale = (grad if weight is None else grad * weight) / inner
    by_output = by_element(scale, x0).to(slope.dtype) * slope
    grad_output = by_output.to(model_output.dtype)
    if not needs_x0:
        return grad_output, x0.new_empty(0)
    if target == "v":
        return grad_output, (by_element(sigma, x0) * by_output).to(x0.dtype)
    per_x0 = {"epsilon": 0.0, "sample": -1.0, "flow": 1.0}[target]
    return grad_output, (per_x0 * by_output).to(x0.dtype)


def _difference(
    model_output: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    delta: Tensor | None,
    target: str,
) -> tuple[Tensor, Tensor]:
    """model_output - target, and delta for every element."""
    wide = torch.promote_types(x0.dtype, torch.promote_types(model_output.dtype, torch.float32))
    a, s = by_element(alpha, x0).to(wide), by_element(sigma, x0).to(wide)
    z, data = drawn(x0, noise, key, sample_ids).to(wide), x0.to(wide)
    d = torch.ones_like(a) if delta is None else by_element(delta, x0).to(wide)
    return model_output.to(wide) - target_of(target, data, z, a, s), d
