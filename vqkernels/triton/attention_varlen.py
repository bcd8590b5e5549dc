"""`attention_varlen` and its gradients: the kernels of `attention` over one sample that holds all
rows, with a program for each tile of the longest sequence; what a shorter one lacks of it ends at
once."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.reference.attention_varlen import as_sample
from vqkernels.triton.attention import Sequences, forward
from vqkernels.triton.attention_backward import backward
from vqkernels.triton.attention_configs import AttentionConfig


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`[T, H, e]` in q's dtype and the softmax's denominator, fp32 logarithm `[H, T]`.

    Args:
        q, k, v: `[T, H, d]`, `[S, Hk, d]`, `[S, Hk, e]`, Hk divides H.
        config: launch configuration instead of the table's.
    """
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    sample = as_sample(q), as_sample(k), as_sample(v), as_sample(out)
    forward(*sample, lse[None], None, is_causal, scale, dropout_p, seed, sequences, config=config)
    return out, lse


def attention_varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    configs: tuple[AttentionConfig, AttentionConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtypes and layouts."""
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    sample = as_sample(grad), as_sample(q), as_sample(k), as_sample(v), as_sample(out)
    grads = backward(
        *sample, lse[None], None, is_causal, scale, dropout_p, seed, sequences, configs=configs
    )
    return tuple(t[0].transpose(0, 1) for t in grads)  # type: ignore[return-value]
