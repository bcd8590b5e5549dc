"""Attention within sequences of varying length that lie one after another, without padding.

    o[rows of sequence b] = softmax(scale q[rows of b] k[keys of b]^T) v[keys of b]

The kernels are those of `attention`; each finds the rows of its sequence by the numbers that
flash-attention's interface for varying lengths passes: sequence b has the rows
`cu_seqlens[b]` to `cu_seqlens[b + 1] - 1`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_floating, check_same_device, check_tensor
from vqkernels.ops._library import define, differentiable, fake, not_differentiable
from vqkernels.ops._modulation import NO_DOUBLE_BACKWARD
from vqkernels.ops.attention import autocast, check_heads, checked_dropout
from vqkernels.reference import attention_varlen as reference

# Also returns the softmax's logarithm `[H, T]`.
_attention_varlen = define(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, bool is_causal, float scale,"
    " float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
    reference.attention_varlen_with_lse,
)


@fake(_attention_varlen)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide)
    return q.new_empty(*q.shape[:2], v.shape[-1]), lse


_attention_varlen_backward = define(
    "attention_varlen_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
    " bool is_causal, float scale,"
    " float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    reference.attention_varlen_backward,
)


@fake(_attention_varlen_backward)
def _(
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
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


not_differentiable(_attention_varlen_backward, NO_DOUBLE_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.more, seed, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, seed)


def _backward(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    *saved, seed = ctx.saved_tensors
    grads = _attention_varlen_backward(grad, *saved, *ctx.more, seed, ctx.backend)
    return *grads, *(None,) * 9


differentiable(_attention_varlen, _backward, _save)


@overload
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
    return_lse: Literal[False] = False,
    dropout_p: float = 0,
    seed: int | Tensor | None = None,
) -> Tensor: ...


@overload
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
    return_lse: Literal[True],
    dropout_p: float = 0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


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
    dropout_p: float = 0,  # not 0.0, which compiling with dynamic shapes makes a symbol
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each sequence's queries to its own keys.

    Args:
        q: `[T, H, d]`, floating point; strides are free, as in a view of a packed `[T, 3, H, d]`.
        k, v: `[S, H, d]` and `[S, H, e]`; with `enable_gqa` their H may divide q's.
        cu_seqlens_q: int32 `[B + 1]`, where each sequence's queries start: rises from 0 to T. A
            sequence may have no queries, or no keys.
        cu_seqlens_k: the same of keys, to S.
        max_seqlen_q, max_seqlen_k: no sequence has more queries, or keys.
        is_causal: query i of a sequence attends to its keys 0..i, as in `attention`;
            flash-attention aligns the last query with the last key, another choice where lengths
            differ.
        scale: factor of the scores, 1 / sqrt(d) by default.
        return_lse: also return the logarithm of the softmax's denominator, which has no gradient.
        dropout_p: the share of weights that are dropped, rounded to a multiple of 1 / 65536; others
            are multiplied by 1 / (1 - dropout_p). `lse` is that of all weights.
        seed: an int (modulo 2^64), or an int64 tensor of one element, which decides with the
            numbers of sequence, head, and query and key in it which weights are dropped: give a new
            one each step. Goes with `dropout_p` above 0.

    Returns:
        `[T, H, e]`, contiguous, in q's dtype, or in autocast's as `attention`; with `return_lse`
        also `[H, T]` in fp32 (float64 for float64). A query without any key gives zeros and -inf.
        Gradients are deterministic.

    Raises:
        TypeError: q, k or v is not floating point, or dtypes differ.
        ValueError: a shape, dtype or device that does not fit; on a GPU more than 256 columns,
            unless the reference is asked for by name. On the CPU also row numbers that do not rise
            from 0 to T or S, or a longer sequence than said; on a GPU looking at them would wait
            for it: kernels keep within the tensors, and rows left out by wrong numbers are
            undefined.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        check_same_device(name, tensor, "q", q)
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be [T, H, d], got shape {list(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must be [S, H, {q.shape[2]}], got shape {list(k.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v must be [{k.shape[0]}, {k.shape[1]}, e], got shape {list(v.shape)}")
    check_heads(q.shape[1], k.shape[1], enable_gqa)
    check_tensor("cu_seqlens_q", cu_seqlens_q)
    check_tensor("cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have one shape, "
            f"got {list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
        )
    _check_starts("cu_seqlens_q", cu_seqlens_q, q, q.shape[0], "max_seqlen_q", max_seqlen_q)
    _check_starts("cu_seqlens_k", cu_seqlens_k, q, k.shape[0], "max_seqlen_k", max_seqlen_k)
    dropout_p, seed = checked_dropout(dropout_p, seed, q)
    q, k, v, _ = autocast(q, k, v, None)
    scale = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale)
    backend = select("attention_varlen", q, k, v)
    out: tuple[Tensor, Tensor] = _attention_varlen(
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
        backend,
    )
    return out if return_lse else out[0]


def _check_starts(
    name: str, starts: Tensor, q: Tensor, rows: int, most_name: str, most: int
) -> None:
    check_same_device(name, starts, "q", q)
    if starts.dtype != torch.int32 or starts.dim() != 1 or starts.shape[0] == 0:
        raise ValueError(f"{name} must be int32 [B + 1], got {starts.dtype} {list(starts.shape)}")
    if most < 0:
        raise ValueError(f"{most_name} must be at least 0, got {most}")
    if torch.compiler.is_compiling() or starts.device.type != "cpu":
        return
    numbers = starts.tolist()
    lengths = [after - before for before, after in pairwise(numbers)]
    if numbers[0] != 0 or numbers[-1] != rows or min(lengths, default=0) < 0:
        raise ValueError(f"{name} must rise from 0 to {rows}, got {numbers}")
    if max(lengths, default=0) > most:
        raise ValueError(f"{most_name} must be at least {max(lengths)}, got {most}")
