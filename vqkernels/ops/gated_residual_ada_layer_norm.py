"""The seam between two adaLN-Zero branches: gate one's output in, normalize for the next.

    new_residual = residual + gate * x
    normed = norm(new_residual) * (1 + scale) + shift

Source: arXiv:2212.09748, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_choice
from vqkernels.ops._library import define, differentiable, fake, not_differentiable
from vqkernels.ops._modulation import (
    NO_DOUBLE_BACKWARD,
    NORMS,
    check_modulation,
    check_same_tokens,
    check_tokens,
    contiguous,
)
from vqkernels.ops.gated_residual import gated_residual_backward
from vqkernels.reference import gated_residual_ada_layer_norm as reference
from vqkernels.reference.ada_layer_norm import row_statistics


def _reference(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    norm: str,
) -> tuple[Tensor, ...]:
    normed, new_residual = reference.gated_residual_ada_layer_norm(
        residual, x, gate=gate, shift=shift, scale=scale, eps=eps, norm=norm
    )
    return contiguous((normed, new_residual, row_statistics(new_residual, eps, norm)))


# Also returns the statistics `[B, N, 2]` of the new residual, for the backward pass.
_fused = define(
    "gated_residual_ada_layer_norm(Tensor residual, Tensor x, Tensor gate, Tensor shift,"
    " Tensor scale, float eps, str norm) -> (Tensor, Tensor, Tensor)",
    _reference,
)


@fake(_fused)
def _(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    norm: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(residual.dtype, torch.float32)
    stream = residual.new_empty(residual.shape)
    return torch.empty_like(stream), stream, x.new_empty((*x.shape[:-1], 2), dtype=wide)


_fused_backward = define(
    "gated_residual_ada_layer_norm_backward(Tensor grad_normed, Tensor? grad_new_residual,"
    " Tensor new_residual, Tensor x, Tensor gate, Tensor shift, Tensor scale, Tensor statistics,"
    " str norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *arguments: contiguous(reference.gated_residual_ada_layer_norm_backward(*arguments)),
)


@fake(_fused_backward)
def _(
    grad_normed: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    statistics: Tensor,
    norm: str,
    backend: str,
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (new_residual, x, gate, shift, scale))


not_differentiable(_fused_backward, NO_DOUBLE_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, gate, shift, scale, _, ctx.norm, ctx.backend = inputs
    _, new_residual, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(new_residual, x, gate, shift, scale, statistics)


def _backward(
    ctx: Any, grad_normed: Tensor | None, grad_new_residual: Tensor | None, _statistics: None
) -> tuple[Tensor | None, ...]:
    new_residual, x, gate, shift, scale, statistics = ctx.saved_tensors
    if grad_normed is None:
        if grad_new_residual is None:
            return (None,) * 8
        grads = gated_residual_backward(grad_new_residual, x, gate, ctx.backend)
        return grad_new_residual, *grads, None, None, None, None, None
    grads = _fused_backward(
        grad_normed,
        grad_new_residual,
        new_residual,
        x,
        gate,
        shift,
        scale,
        statistics,
        ctx.norm,
        ctx.backend,
    )
    return *grads, None, None, None


differentiable(_fused, _backward, _save)


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
    """`gated_residual` followed by `ada_layer_norm`, one pass over the stream where fused.

    Args:
        residual: the stream `[B, N, D]`, floating point.
        x: the branch's output, `[B, N, D]`.
        gate, shift, scale: `[B, D]`, or `[B, F, D]` with F dividing N.
        eps: added to the variance (to the mean square under "rms").
        norm: "layer" or "rms".

    Returns:
        `(normed, new_residual)`, both `[B, N, D]` in residual's dtype, also under autocast; the
        rounded new residual is what is normalized. Gradients are deterministic.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or `norm` that does not fit.
    """
    check_tokens("residual", residual)
    check_same_tokens("x", x, "residual", residual)
    check_modulation("gate", gate, "residual", residual)
    check_modulation("shift", shift, "residual", residual)
    check_modulation("scale", scale, "residual", residual)
    check_choice("norm", norm, NORMS)
    backend = select("gated_residual_ada_layer_norm", residual, x, gate, shift, scale)
    normed, new_residual, _ = _fused(residual, x, gate, shift, scale, eps, norm, backend)
    return normed, new_residual
