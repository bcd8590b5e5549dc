"""GELU of a biased row, the middle of a transformer's MLP.

    gelu(u) = u * Phi(u), or with approximate="tanh"
    gelu(u) = u / 2 * (1 + tanh(sqrt(2 / pi) * (u + 0.044715 u^3)))

where u = x + bias. Source: Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_choice, check_floating
from vqkernels.ops._modulation import check_row
from vqkernels.reference import bias_gelu as reference

APPROXIMATIONS = ("tanh", "none")


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """`gelu(x + bias)`, computed in fp32.

    Args:
        x: `[..., D]`, floating point.
        bias: `[D]`, or None for zero.
        approximate: "tanh" or "none" (the error function), as in `torch.nn.GELU`.

    Returns:
        `[..., D]` in x's dtype.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or `approximate` that does not fit.
    """
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [..., D], got a scalar")
    check_row("bias", bias, x)
    check_choice("approximate", approximate, APPROXIMATIONS)
    select("bias_gelu", x, bias)
    return reference.bias_gelu(x, bias, approximate=approximate)
