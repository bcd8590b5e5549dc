"""Gradients of `attention_qkvpacked`: those of `attention`, written side by side."""

from __future__ import annotations

from torch import Tensor

from vqkernels.reference.attention_qkvpacked import heads_of
from vqkernels.triton.attention_backward import backward


def attention_qkvpacked_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`[B, N, 3, H, d]` in qkv's dtype; grad and out are `[B, N, H, d]`."""
    dqkv = qkv.new_empty(qkv.shape)
    q, k, v = heads_of(qkv)
    backward(
        grad.transpose(1, 2),
        q,
        k,
        v,
        out.transpose(1, 2),
        lse,
        attn_mask,
        is_causal,
        scale,
        dropout_p,
        seed,
        grads=heads_of(dqkv),
    )
    return dqkv
