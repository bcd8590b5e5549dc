"""GELU of a biased row, the middle of a transformer's MLP.

    gelu(u) = u * Phi(u), or with approximate="tanh"
    gelu(u) = u / 2 * (1 + tanh(sqrt(2 / pi) * (u + 0.044715 u^3)))

where u = x + bias. Source: Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_choice, check_floating
from vqkernels.ops._library import define, differentiable, fake, not_differentiable
from vqkernels.ops._modulation import NO_DOUBLE_BACKWARD, check_row, contiguous
from vqkernels.reference import bias_gelu as reference

APPROXIMATIONS = ("tanh", "none")

_bias_gelu = define(
    "bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor",
    lambda x, bias, approximate: reference.bias_gelu(x, bias, approximate=approximate).contiguous(),
)


@fake(_bias_gelu)
def _(x: Tensor, bias: Tensor | None, approximate: str, backend: str) -> Tensor:
    return x.new_empty(x.shape)


_bias_gelu_backward = define(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    lambda *arguments: contiguous(reference.bias_gelu_backward(*arguments)),
)


@fake(_bias_gelu_backward)
def _(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


not_differentiable(_bias_gelu_backward, NO_DOUBLE_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.approximate, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _bias_gelu_backward(grad, x, bias, ctx.approximate, ctx.backend)
    return grad_x, None if bias is None else grad_bias, None, None


differentiable(_bias_gelu, _backward, _save)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """`gelu(x + bias)`, computed in fp32.

    Args:
        x: `[..., D]`, floating point.
        bias: `[D]`, or None for zero.
        approximate: "tanh" or "none" (the error function), as in `torch.nn.GELU`.

    Returns:
        `[..., D]` in x's dtype, also under autocast. Infinities give the limits, infinity and 0 to
        within 1e-27 (`F.gelu` has NaN there, by device and format). Gradients are deterministic.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or `approximate` that does not fit.
    """
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [..., D], got a scalar")
    check_row("bias", bias, x)
    check_choice("approximate", approximate, APPROXIMATIONS)
    backend = select("bias_gelu", x, bias)
    out: Tensor = _bias_gelu(x, bias, approximate, backend)
    return out
