from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels.reference.attention import attention, attention_backward


def heads_of(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, N, 3, H, d]` to three views `[B, H, N, d]`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attention_qkvpacked(qkv: Tensor, **arguments: Any) -> Tensor:
    out = attention(*heads_of(qkv), **arguments)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)  # [B, N, H, d]


def attention_qkvpacked_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> Tensor:
    by_heads = (grad.transpose(1, 2), *heads_of(qkv), out.transpose(1, 2))
    dq, dk, dv = attention_backward(*by_heads, lse, *arguments)
    return torch.stack([t.transpose(1, 2) for t in (dq, dk, dv)], 2)  # [B, N, 3, H, d]
