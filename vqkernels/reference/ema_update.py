from __future__ import annotations

import torch
from torch import Tensor


def ema_update(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: Tensor | float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.as_tensor(decay, dtype=torch.float64, device=counts.device)
    new_size = torch.lerp(counts.double(), cluster_size.double(), weight)  # [..., K]
    new_sum = torch.lerp(sums.double(), embed_sum.double(), weight)  # [..., K, D]
    total = new_size.sum(-1, keepdim=True)
    smoothed = (new_size + eps) / (total + new_size.shape[-1] * eps) * total
    new_codebook = new_sum / smoothed[..., None]
    return new_codebook.to(codebook.dtype), new_size.float(), new_sum.float()
