"""The end of an adaLN-Zero branch: `residual + gate * x`.

The gate starts at zero, so that a block starts as the identity. Source: arXiv:2212.09748,
section 3.2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._library import define, differentiable, fake, not_differentiable
from vqkernels.ops._modulation import (
    NO_DOUBLE_BACKWARD,
    check_modulation,
    check_same_tokens,
    check_tokens,
    contiguous,
)
from vqkernels.reference import gated_residual as reference

_gated_residual = define(
    "gated_residual(Tensor residual, Tensor x, Tensor gate) -> Tensor",
    lambda residual, x, gate: reference.gated_residual(residual, x, gate=gate).contiguous(),
)


@fake(_gated_residual)
def _(residual: Tensor, x: Tensor, gate: Tensor, backend: str) -> Tensor:
    return residual.new_empty(residual.shape)


gated_residual_backward = define(
    "gated_residual_backward(Tensor grad, Tensor x, Tensor gate) -> (Tensor, Tensor)",
    lambda *arguments: contiguous(reference.gated_residual_backward(*arguments)),
)


@fake(gated_residual_backward)
def _(grad: Tensor, x: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


not_differentiable(gated_residual_backward, NO_DOUBLE_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, gate, ctx.backend = inputs
    ctx.save_for_backward(x, gate)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_gate = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_x, grad_gate = gated_residual_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad, grad_x, grad_gate, None


differentiable(_gated_residual, _backward, _save)


def gated_residual(residual: Tensor, x: Tensor, *, gate: Tensor) -> Tensor:
    """`residual + gate * x`, computed in fp32.

    Args:
        residual: the stream `[B, N, D]`, floating point.
        x: the branch's output, `[B, N, D]`.
        gate: `[B, D]`, or `[B, F, D]` with F dividing N.

    Returns:
        `[B, N, D]` in residual's dtype, also under autocast; x and gate may differ from it.
        Gradients are deterministic.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape or device that does not fit.
    """
    check_tokens("residual", residual)
    check_same_tokens("x", x, "residual", residual)
    check_modulation("gate", gate, "residual", residual)
    backend = select("gated_residual", residual, x, gate)
    out: Tensor = _gated_residual(residual, x, gate, backend)
    return out
