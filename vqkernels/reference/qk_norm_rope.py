from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    return (
        _norm_rope(q, q_weight, cos, sin, eps, norm, interleaved),
        _norm_rope(k, k_weight, cos, sin, eps, norm, interleaved),
    )


def _norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    interleaved: bool,
) -> Tensor:
    normed, _ = _normed(x, eps, norm)  # [B, H, N, d]
    if weight is not None:
        normed = normed * weight.to(normed.dtype)
    return rotated(normed, cos, sin, interleaved).to(x.dtype)


def _normed(x: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    """The normalized rows and 1 / their deviation."""
    row = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm == "none":
        return row, row.new_ones(())
    if norm == "layer":
        row = row - row.mean(-1, keepdim=True)
    inverse = (row.square().mean(-1, keepdim=True) + eps).rsqrt()
    return row * inverse, inverse


def rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """Pairs (a, b) of columns to (a cos - b sin, b cos + a sin)."""
    if cos is None or sin is None:
        return x
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # [B, 1, N, d / 2]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


def qk_norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and the weights; no elements for a weight that is None."""
    shared = (cos, sin, eps, norm, interleaved)
    of_q, of_q_weight = _backward(grad_q, q, q_weight, *shared)
    of_k, of_k_weight = _backward(grad_k, k, k_weight, *shared)
    return of_q, of_k, of_q_weight, of_k_weight


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    normed, inverse = _normed(x, eps, norm)
    h = rotated(grad.to(normed.dtype), cos, None if sin is None else -sin, interleaved)
    grad_weight = x.new_empty(0)
    if weight is not None:
        grad_weight = (h * normed).sum((0, 1, 2)).to(weight.dtype)
        h = h * weight.to(h.dtype)
    if norm == "none":
        return h.to(x.dtype), grad_weight
    through_mean = h.mean(-1, keepdim=True) if norm == "layer" else 0
    through_deviation = normed * (h * normed).mean(-1, keepdim=True)
    return ((h - through_mean - through_deviation) * inverse).to(x.dtype), grad_weight


def rope_tables(
    grid: Sequence[int],
    dim: int,
    *,
    theta: float = 10000.0,
    axes_dim: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    if axes_dim is None:
        pairs = dim // 2
        shares = [pairs // len(grid) + (axis < pairs % len(grid)) for axis in range(len(grid))]
        axes_dim = [2 * share for share in shares]
    positions = [torch.arange(size, dtype=torch.float64, device=device) for size in grid]
    angles = []
    for position, width in zip(torch.meshgrid(*positions, indexing="ij"), axes_dim, strict=True):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / max(width, 1)
        angles.append(position.reshape(-1, 1) * theta**-exponents)  # [N, width / 2]
    angle = torch.cat(angles, -1)  # [N, d / 2]
    return angle.cos().float(), angle.sin().float()
