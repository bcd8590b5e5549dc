from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.reference._modulation import per_token, per_vector


def gated_residual(residual: Tensor, x: Tensor, *, gate: Tensor) -> Tensor:
    wide = torch.promote_types(residual.dtype, torch.float32)
    out = residual.to(wide) + per_token(gate, x).to(wide) * x.to(wide)  # [B, N, D]
    return out.to(residual.dtype)


def gated_residual_backward(grad: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and gate; residual's is `grad` itself."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_x = grad.to(wide) * per_token(gate, x).to(wide)  # [B, N, D]
    return grad_x.to(x.dtype), per_vector(grad.to(wide) * x.to(wide), gate)
