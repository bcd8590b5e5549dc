"""Layer normalization whose shift and scale come from a conditioning vector (adaLN).

    out = norm(x) * (1 + scale) + shift

`norm` is LayerNorm, (x - mean) / sqrt(var + eps), or RMSNorm, x / sqrt(mean(x^2) + eps); an
optional weight and bias apply before the modulation. Source: Peebles & Xie 2023, "Scalable
Diffusion Models with Transformers", arXiv:2212.09748, section 3.2.
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
    check_row,
    check_tokens,
    contiguous,
)
from vqkernels.reference import ada_layer_norm as reference


def _reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor]:
    out = reference.ada_layer_norm(
        x, shift=shift, scale=scale, weight=weight, bias=bias, eps=eps, norm=norm
    )
    return out.contiguous(), reference.row_statistics(x, eps, norm)


# Also returns the statistics `[B, N, 2]` that the backward pass needs.
_ada_layer_norm = define(
    "ada_layer_norm(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias,"
    " float eps, str norm) -> (Tensor, Tensor)",
    _reference,
)


@fake(_ada_layer_norm)
def _(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 2), dtype=wide)


_ada_layer_norm_backward = define(
    "ada_layer_norm_backward(Tensor grad, Tensor x, Tensor shift, Tensor scale, Tensor? weight,"
    " Tensor? bias, Tensor statistics, str norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *arguments: contiguous(reference.ada_layer_norm_backward(*arguments)),
)


@fake(_ada_layer_norm_backward)
def _(
    grad: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    norm: str,
    backend: str,
) -> tuple[Tensor, ...]:
    like = (x, shift, scale, weight, bias)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in like)


not_differentiable(_ada_layer_norm_backward, NO_DOUBLE_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, weight, bias, _, ctx.norm, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, shift, scale, weight, bias, output[1])


def _backward(ctx: Any, grad: Tensor, _statistics: None) -> tuple[Tensor | None, ...]:
    x, shift, scale, weight, bias, statistics = ctx.saved_tensors
    grads = _ada_layer_norm_backward(
        grad, x, shift, scale, weight, bias, statistics, ctx.norm, ctx.backend
    )
    given = (x, shift, scale, weight, bias)
    found = (g if t is not None else None for t, g in zip(given, grads, strict=True))
    return *found, None, None, None


differentiable(_ada_layer_norm, _backward, _save)


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
    """`norm(x) * (1 + scale) + shift`, with statistics and products in fp32.

    Args:
        x: tokens `[B, N, D]`, floating point.
        shift, scale: `[B, D]`, or `[B, F, D]` with F dividing N: each vector serves N / F
            consecutive tokens, so F = N is a vector per token.
        weight, bias: `[D]`, applied to the normalized row before the modulation.
        eps: added to the variance (to the mean square under "rms").
        norm: "layer" or "rms".

    Returns:
        `[B, N, D]` in x's dtype, also under autocast, as `F.layer_norm` on a CPU; vectors and x may
        differ in dtype. Gradients are deterministic.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or `norm` that does not fit.
    """
    check_tokens("x", x)
    check_modulation("shift", shift, "x", x)
    check_modulation("scale", scale, "x", x)
    check_row("weight", weight, x)
    check_row("bias", bias, x)
    check_choice("norm", norm, NORMS)
    backend = select("ada_layer_norm", x, shift, scale, weight, bias)
    out: Tensor = _ada_layer_norm(x, shift, scale, weight, bias, eps, norm, backend)[0]
    return out
