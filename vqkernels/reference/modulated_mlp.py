from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vqkernels.reference.ada_layer_norm import ada_layer_norm
from vqkernels.reference.bias_gelu import bias_gelu
from vqkernels.reference.gated_residual import gated_residual


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
    h = ada_layer_norm(x, shift=shift, scale=scale, eps=eps, norm=norm)  # [B, N, D]
    hidden = bias_gelu(F.linear(h, fc1_weight), fc1_bias, approximate=approximate)  # [B, N, M]
    return gated_residual(x, F.linear(hidden, fc2_weight, fc2_bias), gate=gate)
