from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vqkernels.reference import attention as one_length


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = attention_varlen_with_lse(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        is_causal,
        scale,
        dropout_p,
        seed,
    )
    return (out, lse) if return_lse else out


def sequences_of(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of q and rows of k of each sequence."""
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(queries) - 1):
        yield slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])


def as_sample(t: Tensor) -> Tensor:
    """`[T, H, d]` as `[1, H, T, d]`, a view."""
    return t.transpose(0, 1)[None]


def attention_varlen_with_lse(
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
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:2], v.shape[-1])  # [T, H, e]
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide)  # [H, T]
    for i, (rows, keys) in enumerate(sequences_of(cu_seqlens_q, cu_seqlens_k)):
        sample = as_sample(q[rows]), as_sample(k[keys]), as_sample(v[keys])
        results = one_length.attention_with_lse(
            *sample, None, is_causal, scale, dropout_p, seed, i * q.shape[1]
        )
        as_sample(out)[:, :, rows], lse[:, rows] = results[0], results[1][0]
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
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    for i, (rows, keys) in enumerate(sequences_of(cu_seqlens_q, cu_seqlens_k)):
        places = (rows, keys, keys)
        sample = as_sample(q[rows]), as_sample(k[keys]), as_sample(v[keys])
        of_grad, of_out = as_sample(grad[rows]), as_sample(out[rows])
        found = one_length.attention_backward(
            of_grad,
            *sample,
            of_out,
            lse[None, :, rows],
            None,
            is_causal,
            scale,
            dropout_p,
            seed,
            i * q.shape[1],
        )
        for whole, at, part in zip(grads, places, found, strict=True):
            as_sample(whole)[:, :, at] = part
    return grads
