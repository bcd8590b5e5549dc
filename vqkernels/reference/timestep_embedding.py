from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / max(half, 1)
    angles = t.double()[:, None] * torch.exp(-math.log(max_period) * exponents)  # [B, dim / 2]
    embedding = torch.cat([angles.cos(), angles.sin(), angles.new_zeros(len(t), dim % 2)], dim=-1)
    return embedding.float()
