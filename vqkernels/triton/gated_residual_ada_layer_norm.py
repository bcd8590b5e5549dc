"""Launches of `gated_residual_ada_layer_norm`: the kernels of `ada_layer_norm` with a gated sum.

Floors stand there. Rows of more columns than registers hold take the two ops one after the other
forward, which reads the new residual once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.triton.ada_layer_norm import normalize
from vqkernels.triton.ada_layer_norm_backward import normalize_backward
from vqkernels.triton.gated_residual import gated_residual
from vqkernels.triton.modulation_configs import RowConfig, select_rows
from vqkernels.triton.modulation_rows import tokens_of, vector_of


def gated_residual_ada_layer_norm(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    norm: str,
    *,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized rows, the new residual, and its rows' mean and 1 / deviation."""
    out = residual.new_empty(residual.shape)
    statistics = residual.new_empty((*residual.shape[:-1], 2), dtype=torch.float32)
    if out.numel() == 0:
        return out, torch.empty_like(out), statistics.zero_()
    tokens = x.shape[1]
    gates, shifts, scales = (vector_of(of, tokens) for of in (gate, shift, scale))
    config = config or select_rows("norm", x.shape[-1])
    if config.block:
        stream = gated_residual(residual, x, gate)
        rows, gated = tokens_of(stream), None
    else:
        stream = torch.empty_like(out)
        rows, gated = tokens_of(residual), (tokens_of(x), gates, stream)
    normalize(
        rows,
        shifts,
        scales,
        None,
        None,
        eps,
        norm,
        out,
        statistics,
        gated=gated,
        config=config,
    )
    return out, stream, statistics


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
    *,
    config: RowConfig | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of residual, x, gate, shift and scale."""
    grad_residual, grad_shift, grad_scale, _, _, grad_x, grad_gate = normalize_backward(
        grad_normed,
        new_residual,
        shift,
        scale,
        None,
        None,
        statistics,
        norm,
        gated=(grad_new_residual, x, gate),
        config=config,
    )
    return grad_residual, grad_x, grad_gate, grad_shift, grad_scale
