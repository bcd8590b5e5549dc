from __future__ import annotations

import torch
from torch import Tensor


def diffuse(
    x0: Tensor, alpha: Tensor, sigma: Tensor, *, noise: Tensor, target: str = "epsilon"
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x0.dtype, torch.float32)
    per_sample = (-1,) + (1,) * (x0.dim() - 1)
    a = alpha.to(wide).reshape(per_sample)  # [B, 1, ...]
    s = sigma.to(wide).reshape(per_sample)
    data, z = x0.to(wide), noise.to(wide)  # [B, ...]
    targets = {"epsilon": z, "sample": data, "v": a * z - s * data, "flow": z - data}
    return (a * data + s * z).to(x0.dtype), targets[target].to(x0.dtype)
