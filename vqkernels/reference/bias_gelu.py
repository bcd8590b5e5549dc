from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    return F.gelu(total, approximate=approximate).to(x.dtype)
