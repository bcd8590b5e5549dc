from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if not return_lse:
        return out
    return out, log_sum_exp(q, k, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Logarithm of the softmax's denominator, fp32 (float64 for float64) `[B, H, N]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, H, M, d]
    scores = q.to(wide) @ keys.to(wide).mT * scale  # [B, H, N, M]
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(wide)
    return scores.logsumexp(-1)
