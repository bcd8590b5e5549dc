from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.reference._modulation import per_token


def gated_residual(residual: Tensor, x: Tensor, *, gate: Tensor) -> Tensor:
    wide = torch.promote_types(residual.dtype, torch.float32)
    out = residual.to(wide) + per_token(gate, x).to(wide) * x.to(wide)  # [B, N, D]
    return out.to(residual.dtype)
