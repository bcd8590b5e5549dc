"""The MLP branch of an adaLN-Zero block, in one call.

    h = norm(x) * (1 + scale) + shift
    out = x + gate * (gelu(h fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias)

The matrix products are PyTorch's own; what is between them runs on `ada_layer_norm`, `bias_gelu`
and `gated_residual`. Source: arXiv:2212.09748, section 3.2 and figure 3.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vqkernels.ops._modulation import check_bias, check_tokens, check_weight
from vqkernels.ops.ada_layer_norm import ada_layer_norm
from vqkernels.ops.bias_gelu import bias_gelu
from vqkernels.ops.gated_residual import gated_residual


def modulated_mlp(
    x: Tensor,
    *,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    approximate: str = "tanh",
    eps: float = 1e-6,
    norm: str = "layer",
) -> Tensor:
    """`x + gate * mlp(norm(x) * (1 + scale) + shift)`, with a GELU between two layers.

    Args:
        x: tokens `[B, N, D]`, floating point.
        shift, scale, gate: `[B, D]`, or `[B, F, D]` with F dividing N, as in `ada_layer_norm`.
        fc1_weight, fc1_bias: `[M, D]` and `[M]`; the bias is added in the GELU's pass.
        fc2_weight, fc2_bias: `[D, M]` and `[D]`.
        approximate: "tanh" or "none", as in `bias_gelu`.
        eps, norm: as in `ada_layer_norm`.

    Returns:
        `[B, N, D]` in x's dtype. The products follow autocast as `F.linear` does. What runs on our
        kernels has deterministic gradients.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or choice that does not fit.
    """
    check_tokens("x", x)
    dim = x.shape[-1]
    check_weight("fc1_weight", fc1_weight, None, dim, x)
    check_weight("fc2_weight", fc2_weight, dim, fc1_weight.shape[0], x)
    check_bias("fc1_bias", fc1_bias, fc1_weight)
    check_bias("fc2_bias", fc2_bias, fc2_weight)

    h = ada_layer_norm(x, shift=shift, scale=scale, eps=eps, norm=norm)
    hidden = bias_gelu(F.linear(h, fc1_weight), fc1_bias, approximate=approximate)
    return gated_residual(x, F.linear(hidden, fc2_weight, fc2_bias), gate=gate)
