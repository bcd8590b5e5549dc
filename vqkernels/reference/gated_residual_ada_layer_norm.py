from __future__ import annotations

from torch import Tensor

from vqkernels.reference.ada_layer_norm import ada_layer_norm
from vqkernels.reference.gated_residual import gated_residual


def gated_residual_ada_layer_norm(
    residual: Tensor,
    x: Tensor,
    *,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    new_residual = gated_residual(residual, x, gate=gate)  # [B, N, D]
    normed = ada_layer_norm(new_residual, shift=shift, scale=scale, eps=eps, norm=norm)
    return normed, new_residual
