from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels.reference._modulation import per_token, per_vector


def ada_layer_norm(
    x: Tensor,
    *,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    row, size = x.to(wide), x.shape[-1:]  # [B, N, D]
    weight = None if weight is None else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if norm == "layer":
        normed = F.layer_norm(row, size, weight, bias, eps)
    else:
        normed = F.rms_norm(row, size, weight, eps)
        normed = normed if bias is None else normed + bias
    out = normed * (1 + per_token(scale, x).to(wide)) + per_token(shift, x).to(wide)
    return out.to(x.dtype)


def row_statistics(x: Tensor, eps: float, norm: str) -> Tensor:
    """`[B, N, 2]`: the mean (0 under "rms") and 1 / the deviation from it."""
    row = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = row.mean(-1) if norm == "layer" else row.new_zeros(row.shape[:-1])
    variance = (row - mean[..., None]).square().mean(-1)
    return torch.stack([mean, (variance + eps).rsqrt()], dim=-1)


def ada_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, shift, scale, weight and bias; no elements for what is None."""
    wide = statistics.dtype
    mean, inverse = statistics[..., :1], statistics[..., 1:]  # [B, N, 1]
    normed = (x.to(wide) - mean) * inverse
    affine = normed if weight is None else normed * weight.to(wide)
    affine = affine if bias is None else affine + bias.to(wide)
    grad_affine = grad.to(wide) * (1 + per_token(scale, x).to(wide))

    h = grad_affine if weight is None else grad_affine * weight.to(wide)
    through_deviation = normed * (h * normed).mean(-1, keepdim=True)
    through_mean = h.mean(-1, keepdim=True) if norm == "layer" else 0
    grad_x = (h - through_mean - through_deviation) * inverse

    grad_weight, grad_bias = x.new_empty(0), x.new_empty(0)
    if weight is not None:
        grad_weight = (grad_affine * normed).sum((0, 1)).to(weight.dtype)
    if bias is not None:
        grad_bias = grad_affine.sum((0, 1)).to(bias.dtype)
    grad_shift = per_vector(grad.to(wide), shift)
    grad_scale = per_vector(grad.to(wide) * affine, scale)
    return grad_x.to(x.dtype), grad_shift, grad_scale, grad_weight, grad_bias
