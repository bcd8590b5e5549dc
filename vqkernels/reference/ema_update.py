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
    new_size = torch.lerp(counts, cluster_size, decay)  # [..., K]
    new_sum = torch.lerp(sums, embed_sum, decay)  # [..., K, D]
    total = new_size.sum(-1, keepdim=True)
    smoothed = (new_size + eps) / (total + new_size.shape[-1] * eps) * total
    new_codebook = (new_sum / smoothed[..., None]).to(codebook.dtype)
    return new_codebook, new_size, new_sum
