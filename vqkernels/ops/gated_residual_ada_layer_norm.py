"""The seam between two adaLN-Zero branches: gate one's output in, normalize for the next.

    new_residual = residual + gate * x
    normed = norm(new_residual) * (1 + scale) + shift

Source: arXiv:2212.09748, section 3.2.
"""

from __future__ import annotations

from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_choice
from vqkernels.ops._modulation import (
    NORMS,
    check_modulation,
    check_same_tokens,
    check_tokens,
)
from vqkernels.reference import gated_residual_ada_layer_norm as reference


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
        `(normed, new_residual)`, both `[B, N, D]` in residual's dtype.

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
    select("gated_residual_ada_layer_norm", residual, x, gate, shift, scale)
    return reference.gated_residual_ada_layer_norm(
        residual, x, gate=gate, shift=shift, scale=scale, eps=eps, norm=norm
    )
