"""Layer normalization whose shift and scale come from a conditioning vector (adaLN).

    out = norm(x) * (1 + scale) + shift

`norm` is LayerNorm, (x - mean) / sqrt(var + eps), or RMSNorm, x / sqrt(mean(x^2) + eps); an
optional weight and bias apply before the modulation. Source: Peebles & Xie 2023, "Scalable
Diffusion Models with Transformers", arXiv:2212.09748, section 3.2.
"""

from __future__ import annotations

from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_choice
from vqkernels.ops._modulation import NORMS, check_modulation, check_row, check_tokens
from vqkernels.reference import ada_layer_norm as reference


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
        `[B, N, D]` in x's dtype.

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
    select("ada_layer_norm", x, shift, scale)
    return reference.ada_layer_norm(
        x, shift=shift, scale=scale, weight=weight, bias=bias, eps=eps, norm=norm
    )
