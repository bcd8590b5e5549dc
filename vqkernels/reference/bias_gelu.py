from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    out = F.gelu(total, approximate=approximate)
    # Far out, where GELU is 0 or its argument, F.gelu itself overflows or has NaN on some devices.
    return torch.where(total.abs() > 40, total.clamp(min=0), out).to(x.dtype)


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    """The gradients of x and bias; no elements for a bias that is None."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    # Far out the slope is 0 or 1; the formula has infinity times zero there.
    total = total.clamp(-40, 40)
    grad_total = torch.ops.aten.gelu_backward(grad.to(wide), total, approximate=approximate)
    if bias is None:
        return grad_total.to(x.dtype), x.new_empty(0)
    grad_bias = grad_total[None].flatten(end_dim=-2).sum(0)
    return grad_total.to(x.dtype), grad_bias.to(bias.dtype)
