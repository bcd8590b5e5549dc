from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels.reference._modulation import per_token


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
    wide = torch.promote_types(x.dtype, torch.float32)
    row, size = x.to(wide), x.shape[-1:]  # [B, N, D]
    weight = None if weight is None else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if norm == "layer":
        normed = F.layer_norm(row, size, weight, bias, eps)
    else:
        normed = F.rms_norm(row, size, weight, eps)
        normed = normed if bias is None else normed + bias
    out = normed * (1 + per_token(scale, x).to(wide)) + per_token(shift, x).to(wide)
    return out.to(x.dtype)
