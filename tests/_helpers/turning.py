"""`qk_norm_rope` as plain PyTorch, and its inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def normalize(x: Tensor, norm: str, weight: Tensor | None) -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, None, 1e-6)
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    return x if weight is None else x * weight


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As a product of complex numbers."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).mT
    a, b = pairs.unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return turned.flatten(-2) if interleaved else turned.mT.flatten(-2)


def eager_turned(
    norm: str, interleaved: bool, tables: tuple[Tensor, Tensor] | None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of q, k and their weights, if any."""

    def function(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        q_weight, k_weight = weights or (None, None)
        results = normalize(q, norm, q_weight), normalize(k, norm, k_weight)
        if tables is None:
            return results
        cos, sin = (table.to(q.dtype) for table in tables)
        return turn(results[0], cos, sin, interleaved), turn(results[1], cos, sin, interleaved)

    return function


def draw_heads(
    heads: int, key_heads: int, tokens: int, dim: int, dtype: torch.dtype, batch: int = 2
) -> tuple[list[Tensor], list[Tensor]]:
    """(q, k, both weights) and the gradients of both results."""
    q, grad_q = (torch.randn(batch, heads, tokens, dim).to(dtype) for _ in "qg")
    k, grad_k = (torch.randn(batch, key_heads, tokens, dim).to(dtype) for _ in "kg")
    weights = [torch.randn(dim).to(dtype) for _ in "qk"]
    return [q, k, *weights], [grad_q, grad_k]
