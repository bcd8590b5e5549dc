from __future__ import annotations

from torch import Tensor

from vqkernels.reference.ada_layer_norm import ada_layer_norm, ada_layer_norm_backward
from vqkernels.reference.gated_residual import gated_residual, gated_residual_backward


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


def gated_residual_ada_layer_norm_backward(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    statistics: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of residual, x, gate, shift and scale."""
    wide = statistics.dtype
    through_norm, grad_shift, grad_scale, _, _ = ada_layer_norm_backward(
        grad_normed, new_residual.to(wide), shift, scale, None, None, statistics, norm
    )
    grad = through_norm if grad_new_residual is None else through_norm + grad_new_residual.to(wide)
    grad_x, grad_gate = gated_residual_backward(grad, x, gate)
    return grad.to(new_residual.dtype), grad_x, grad_gate, grad_shift, grad_scale
