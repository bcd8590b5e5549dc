"""The end of an adaLN-Zero branch: `residual + gate * x`.

The gate starts at zero, so that a block starts as the identity. Source: arXiv:2212.09748,
section 3.2.
"""

from __future__ import annotations

from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._modulation import check_modulation, check_same_tokens, check_tokens
from vqkernels.reference import gated_residual as reference


def gated_residual(residual: Tensor, x: Tensor, *, gate: Tensor) -> Tensor:
    """`residual + gate * x`, computed in fp32.

    Args:
        residual: the stream `[B, N, D]`, floating point.
        x: the branch's output, `[B, N, D]`.
        gate: `[B, D]`, or `[B, F, D]` with F dividing N.

    Returns:
        `[B, N, D]` in residual's dtype.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape or device that does not fit.
    """
    check_tokens("residual", residual)
    check_same_tokens("x", x, "residual", residual)
    check_modulation("gate", gate, "residual", residual)
    select("gated_residual", residual, x, gate)
    return reference.gated_residual(residual, x, gate=gate)
