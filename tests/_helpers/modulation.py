"""The modulation ops, ours and as plain PyTorch, and random vectors of every form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels import ada_layer_norm, gated_residual, gated_residual_ada_layer_norm


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def vector(batch: int, frames: int | None, dim: int, dtype: torch.dtype) -> Tensor:
    return (
        randn(batch, dim, dtype=dtype) if frames is None else randn(batch, frames, dim, dtype=dtype)
    )


def spread(vector: Tensor, tokens: int) -> Tensor:
    """A vector for each token, from the definition."""
    if vector.dim() == 2:
        vector = vector[:, None]
    return vector.repeat_interleave(tokens // vector.shape[1], dim=1)


def normalize(
    x: Tensor, norm: str, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    if norm == "layer":
        normed = F.layer_norm(x, x.shape[-1:], weight, None, 1e-6)
    else:
        normed = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    return normed if bias is None else normed + bias


def eager_norm(norm: str) -> Callable[..., Tensor]:
    def function(x: Tensor, shift: Tensor, scale: Tensor, *affine: Tensor) -> Tensor:
        tokens = x.shape[1]
        return normalize(x, norm, *affine) * (1 + spread(scale, tokens)) + spread(shift, tokens)

    return function


def eager_gate(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return residual + spread(gate, x.shape[1]) * x


def eager_fused(norm: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(
        residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        stream = eager_gate(residual, x, gate)
        return eager_norm(norm)(stream, shift, scale), stream

    return function


def our_norm(norm: str) -> Callable[..., Tensor]:
    def function(x: Tensor, shift: Tensor, scale: Tensor, *affine: Tensor) -> Tensor:
        weight, bias = affine or (None, None)
        return ada_layer_norm(x, shift=shift, scale=scale, weight=weight, bias=bias, norm=norm)

    return function


def our_gate(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return gated_residual(residual, x, gate=gate)


def our_fused(norm: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(
        residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        return gated_residual_ada_layer_norm(
            residual, x, gate=gate, shift=shift, scale=scale, norm=norm
        )

    return function
