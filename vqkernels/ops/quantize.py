"""A vector quantizer's forward and backward: search, codes, losses and counts in one op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import (
    METRICS,
    check_choice,
    check_labels,
    check_rows,
    check_same_device,
)
from vqkernels.ops._library import define, differentiable, fake, not_differentiable
from vqkernels.ops.nearest_code import check_packed
from vqkernels.reference import quantize as reference

GRADIENTS = ("straight_through", "rotation", "none")


class QuantizeOutput(NamedTuple):
    """What `quantize` returns.

    Attributes:
        quantized: the chosen codes, x's shape and dtype.
        indices: int64, x's shape without D.
        commitment_loss: float32 mean of (x - code)^2; its gradient goes to x alone.
        codebook_loss: the same value; its gradient goes to the codebook alone.
        counts: float32 `[K]` or `[G, K]`, how often each code was chosen.
    """

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    counts: Tensor


_quantize = define(
    "quantize(Tensor x, Tensor codebook, str metric, Tensor? mask, str gradient, Tensor? packed)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, codebook, metric, mask, gradient, packed: reference.quantize(
        x, codebook, metric=metric, mask=mask
    ),
)


@fake(_quantize)
def _(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    mask: Tensor | None,
    gradient: str,
    packed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    return (
        torch.empty_like(x),
        x.new_empty(x.shape[:-1], dtype=torch.int64),
        loss,
        torch.empty_like(loss),
        x.new_empty(codebook.shape[:-1], dtype=torch.float32),
    )


_quantize_backward_x = define(
    "quantize_backward_x(Tensor? grad_quantized, Tensor? grad_commitment, Tensor x,"
    " Tensor codebook, Tensor indices, str gradient) -> Tensor",
    lambda grad_quantized, grad_commitment, x, codebook, indices, gradient: (
        reference.quantize_backward_x(
            grad_quantized, grad_commitment, x, codebook, indices, gradient=gradient
        )
    ),
)


@fake(_quantize_backward_x)
def _(
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    gradient: str,
    backend: str,
) -> Tensor:
    return torch.empty_like(x)


_quantize_backward_codebook = define(
    "quantize_backward_codebook(Tensor grad_codebook_loss, Tensor x, Tensor codebook,"
    " Tensor indices) -> Tensor",
    reference.quantize_backward_codebook,
)


@fake(_quantize_backward_codebook)
def _(
    grad_codebook_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, backend: str
) -> Tensor:
    return codebook.new_empty(codebook.shape)


_NO_DOUBLE_BACKWARD = "a second derivative is not implemented"
not_differentiable(_quantize_backward_x, _NO_DOUBLE_BACKWARD)
not_differentiable(_quantize_backward_codebook, _NO_DOUBLE_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebook, _, _, ctx.gradient, _, ctx.backend = inputs
    _, indices, _, _, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, codebook, indices)


def _backward(
    ctx: Any,
    grad_quantized: Tensor | None,
    _indices: None,
    grad_commitment: Tensor | None,
    grad_codebook_loss: Tensor | None,
    _counts: None,
) -> tuple[Tensor | None, ...]:
    x, codebook, indices = ctx.saved_tensors
    grad_x = grad_codebook = None
    if ctx.needs_input_grad[0]:
        grad_x = _quantize_backward_x(
            grad_quantized, grad_commitment, x, codebook, indices, ctx.gradient, ctx.backend
        )
    if ctx.needs_input_grad[1] and grad_codebook_loss is not None:
        grad_codebook = _quantize_backward_codebook(
            grad_codebook_loss, x, codebook, indices, ctx.backend
        )
    return grad_x, grad_codebook, None, None, None, None, None


differentiable(_quantize, _backward, _save)


def quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    gradient: str = "straight_through",
    packed: Tensor | None = None,
) -> QuantizeOutput:
    """Replace each row by its nearest code, with the two losses that train encoder and codebook.

        quantized       = codebook[nearest_code(x, codebook)]
        commitment_loss = mean((x - stop_gradient(quantized))^2)
        codebook_loss   = mean((stop_gradient(x) - quantized)^2)

    Source: van den Oord et al., "Neural Discrete Representation Learning", arXiv:1711.00937.

    Args:
        x: `[..., N, D]` with one book, `[..., G, N, D]` with G books; float32, float16, bfloat16.
            Any strides; a channel-first feature map goes in as a view.
        codebook: `[K, D]` or `[G, K, D]`, x's dtype or float32.
        metric: "l2", "dot" or "cosine": which code is nearest. Losses are squared distances to
            the chosen code under every metric.
        mask: optional bool, x's shape without D. False marks a position to leave out: index -1,
            zeros, no loss, no count, no gradient.
        gradient: of `quantized` towards x. "straight_through" copies it; "rotation" turns and
            scales it as x would have to be to become its code (the rotation trick, Fifty et al.,
            arXiv:2410.06424); "none" stops it.
        packed: `pack_codebook(codebook, metric=metric)` of a frozen book.

    Returns:
        QuantizeOutput. Losses are float32 means over the elements of all rows that have a code.
        A row with a NaN or an infinity has no code: index -1, a row of NaN, no loss, no count,
        no gradient. Gradients are deterministic.

    Raises:
        TypeError, ValueError: as `nearest_code`; a mask of the wrong shape or dtype; an unknown
            `gradient`.
    """
    check_rows("x", x, codebook)
    check_choice("metric", metric, METRICS)
    check_choice("gradient", gradient, GRADIENTS)
    if mask is not None:
        check_labels("mask", mask, x.shape[:-1], (torch.bool,))
        check_same_device("mask", mask, "x", x)
    if packed is not None:
        check_packed(packed, codebook)
    backend = select("quantize", x, codebook)
    return QuantizeOutput(*_quantize(x, codebook, metric, mask, gradient, packed, backend))
