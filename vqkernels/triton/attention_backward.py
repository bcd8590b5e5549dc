"""Launches of `attention`'s gradients. With P the weights, S the scaled scores, g the gradient:

    dV = P^T g     dS = P (g V^T - delta)     delta = rowsum(g * out)
    dQ = scale dS K                           dK = scale dS^T Q

P is formed anew from q, k and the logarithm of the softmax's denominator. One kernel sums dQ over
tiles of keys, another dK and dV over tiles of queries and, where heads share a key, over those
heads. Both go in a fixed order and without atomics, so that gradients are the same bits each time.

Floor: seven products of 2 B H N M d, against the forward's two; summing all three gradients in one
kernel would take five, but the sums of dQ would need float atomics or a buffer for each block of
keys (M / 64 times the size of q, in fp32), written and read.

In half precision, out is rounded and so are delta and dS, and a row of dS no longer sums to zero:
keys of a large mean would carry that sum into dQ. So the kernel for dQ sums its rows of dS. What
the sum in fp32 leaves is delta's error, which it corrects for the kernel that follows; the sum of
dS as multiplied times a vector near the keys' mean (in truth zero, whatever the vector) it takes
out of dQ.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.attention import (
    _LOG2_E,
    Sequences,
    choose,
    common_unit,
    dot_rows,
    dropout_arguments,
    head_of,
    kept_weights,
    load_rows,
    load_tile,
    mask_arguments,
    masked,
    modes,
    place,
    row_terms_at,
    rows_beside,
    sizes_of,
    span,
    starts_of,
    store_rows,
    strides_of,
    tiles,
    zeros_of,
)
from vqkernels.triton.attention_configs import AttentionConfig
from vqkernels.triton.launch import launch

# Elements of a tile of `_row_terms_of_gradient`: 32 a thread of four warps.
_TILE = 4096


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    configs: tuple[AttentionConfig, AttentionConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtypes and layouts.

    Args:
        grad: of out, `[B, H, N, e]`; the others as `attention` took and returned them.
        configs: launch configurations of the kernels for q and for k and v.
    """
    return backward(
        grad, q, k, v, out, lse, attn_mask, is_causal, scale, dropout_p, seed, configs=configs
    )


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    sequences: Sequences | None = None,
    *,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
    configs: tuple[AttentionConfig, AttentionConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes to `grads`, whose columns are adjacent, where they are given."""
    grads = grads or (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    if 0 in (q.numel(), k.numel(), v.numel()):
        return tuple(t.zero_() for t in grads)  # type: ignore[return-value]
    q, k, v, out, grad = (rows_beside(t) for t in (q, k, v, out, grad))
    dq, dk, dv = (rows_beside(t) for t in grads)
    batch, heads, rows, _ = q.shape
    sequence_count, queries, keys = sizes_of(q, k, sequences)
    of_queries, of_keys = configs or (
        choose("queries", q, v, attn_mask, seed is not None),
        choose("keys", q, v, attn_mask, seed is not None),
    )

    exponents, delta = q.new_empty((2, *q.shape[:-1]), dtype=torch.float32)
    block_e = triton.next_power_of_2(v.shape[-1])
    block = max(1, _TILE // block_e)
    row_unit = common_unit(grad, out)
    launch(
        _row_terms_of_gradient,
        triton.cdiv(rows, block) * batch * heads,
        grad,
        strides_of(grad, row_unit),
        out,
        strides_of(out, row_unit),
        lse.contiguous(),
        exponents,
        delta,
        rows,
        heads,
        UNIT=row_unit,
        E=v.shape[-1],
        BLOCK=block,
        BLOCK_E=block_e,
        num_warps=4,
    )

    unit = common_unit(q, k, v, grad, dq, dk, dv)
    shared = (
        q,
        strides_of(q, unit),
        k,
        strides_of(k, unit),
        v,
        strides_of(v, unit),
        grad,
        strides_of(grad, unit),
        exponents,
        delta,
        *mask_arguments(attn_mask, q),
        *starts_of(q, k, sequences),
        *dropout_arguments(q, dropout_p, seed),
    )
    sizes = (queries, keys, heads, heads // k.shape[1], scale, scale * _LOG2_E.value)
    constants = {"UNIT": unit, "CAUSAL": is_causal, "VARLEN": sequences is not None}
    constants["DROPOUT"] = seed is not None
    constants |= modes(q, v, attn_mask)
    launch(
        _attention_grad_queries,
        triton.cdiv(queries, of_queries.block_q) * sequence_count * heads,
        *shared,
        dq,
        strides_of(dq, unit),
        *sizes,
        **constants,
        **tiles(of_queries, seed is not None),
    )
    launch(
        _attention_grad_keys,
        triton.cdiv(keys, of_keys.block_k) * sequence_count * k.shape[1],
        *shared,
        dk,
        strides_of(dk, unit),
        dv,
        strides_of(dv, unit),
        *sizes,
        **constants,
        **tiles(of_keys, seed is not None),
    )
    written = zip(grads, (dq, dk, dv), strict=True)
    return tuple(t if t is filled else t.copy_(filled) for t, filled in written)  # type: ignore[return-value]


@triton.jit
def _row_terms_of_gradient(
    grad,
    grad_strides,
    out,
    out_strides,
    lse,
    exponents,
    delta,
    N,
    heads,
    UNIT: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A query's lse as an exponent of two, +inf where it has no key (its weights become zero), and
    its delta. One that sees nothing but finfo.min counts as without a key here: fp32 does not hold
    what its weights differ by."""
    block, b, h = place(N, heads, BLOCK)
    row = tl.arange(0, BLOCK)
    first = block * BLOCK
    inside = first + row < N
    grad_head = head_of(grad, grad_strides, b, h, first, UNIT)
    out_head = head_of(out, out_strides, b, h, first, UNIT)
    g, _ = load_rows(grad_head, grad_strides[2], row, inside, True, E, BLOCK_E, 0, UNIT)
    o, _ = load_rows(out_head, out_strides[2], row, inside, True, E, BLOCK_E, 0, UNIT)
    at = (b.to(tl.int64) * heads + h) * N + first + row
    denominator = tl.load(lse + at, mask=inside, other=0.0)
    exponent = tl.where(denominator < -1.0e38, float("inf"), denominator * _LOG2_E)
    tl.store(exponents + at, exponent, mask=inside)
    tl.store(delta + at, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1), mask=inside)


@triton.jit
def _attention_grad_queries(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    grad,
    grad_strides,
    exponents,
    delta,
    mask,
    mask_strides,
    q_starts,
    k_starts,
    rows,
    seed,
    drop_below,
    kept_factor,
    dq,
    dq_strides,
    N,
    M,
    heads,
    group,
    scale,
    scale_of_two,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    E1: tl.constexpr,
    E2: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_Q queries of one head against all keys that they see."""
    block, b, h = place(N, heads, BLOCK_Q)
    if CAUSAL:  # the programs with the most keys start first
        block = tl.cdiv(N, BLOCK_Q) - 1 - block
    row = tl.arange(0, BLOCK_Q)
    first_query = block * BLOCK_Q
    query = first_query + row
    q_from = 0
    k_from = 0
    if VARLEN:
        q_from, k_from, N, M = span(q_starts, k_starts, rows, b, N, M)
        M = tl.where(first_query < N, M, 0)  # beyond the last query nothing is to be done
    q_head = head_of(q, q_strides, b, h, q_from, UNIT)
    q_tile = load_tile(q_head, q_strides[2], first_query, BLOCK_Q, N, True, D, D1, D2, UNIT)
    g_head = head_of(grad, grad_strides, b, h, q_from, UNIT)
    g_tile = load_tile(g_head, grad_strides[2], first_query, BLOCK_Q, N, True, E, E1, E2, UNIT)
    k_head = head_of(k, k_strides, b, h // group, k_from, UNIT)
    v_head = head_of(v, v_strides, b, h // group, k_from, UNIT)
    mask += b.to(tl.int64) * mask_strides[0] + h.to(tl.int64) * mask_strides[1]
    at = row_terms_at(b, h, q_from, heads, N, rows, VARLEN) + query
    exponent = tl.load(exponents + at, mask=query < N, other=float("inf"))[:, None]
    row_delta = tl.load(delta + at, mask=query < N, other=0.0)

    end = M
    whole = M // BLOCK_K * BLOCK_K
    if CAUSAL:
        end = tl.minimum(M, first_query + BLOCK_Q)
        whole = tl.minimum(M, first_query + 1) // BLOCK_K * BLOCK_K
    sum1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    sum2 = zeros_of(BLOCK_Q, D2)
    slope = tl.zeros([BLOCK_Q], tl.float32)
    rounded_slope = tl.zeros([BLOCK_Q], tl.float32)
    # Keys that every query sees, then those at the end of M or on the diagonal.
    for EDGE in tl.static_range(2):
        first = whole if EDGE else 0
        last = end if EDGE else whole
        for start in range(first, last, BLOCK_K):
            key = start + tl.arange(0, BLOCK_K)
            k_tile = load_tile(k_head, k_strides[2], start, BLOCK_K, M, EDGE, D, D1, D2, UNIT)
            v_tile = load_tile(v_head, v_strides[2], start, BLOCK_K, M, EDGE, E, E1, E2, UNIT)
            scores = dot_rows(q_tile, k_tile, BLOCK_Q, BLOCK_K, D2, PRECISION) * scale_of_two
            scores = masked(
                scores,
                mask,
                mask_strides,
                query[:, None],
                key[None, :],
                N,
                M,
                MASK,
                MASK_OF_KEYS,
                CAUSAL and EDGE,
                EDGE,
            )
            weights = tl.exp2(scores - exponent)
            slopes = dot_rows(g_tile, v_tile, BLOCK_Q, BLOCK_K, E2, PRECISION)
            if DROPOUT:
                kept = kept_weights(
                    seed, drop_below, b, h, heads, first_query, start, BLOCK_Q, BLOCK_K
                )
                slopes = tl.where(kept, slopes * kept_factor, 0.0)
            slopes = weights * (slopes - row_delta[:, None])
            slope += tl.sum(slopes, 1)
            slopes = slopes.to(q.dtype.element_ty)
            rounded_slope += tl.sum(slopes.to(tl.float32), 1)
            sum1 = tl.dot(slopes, k_tile[0], sum1, input_precision=PRECISION)
            if D2 > 0:
                sum2 = tl.dot(slopes, k_tile[1], sum2, input_precision=PRECISION)

    tl.store(delta + at, row_delta + slope, mask=query < N)
    # The mean of the first tile's keys, which every query's program has read anyway.
    k_tile = load_tile(k_head, k_strides[2], 0, BLOCK_K, M, True, D, D1, D2, UNIT)
    share = (rounded_slope / tl.maximum(tl.minimum(M, BLOCK_K), 1))[:, None]
    sum1 -= share * tl.sum(k_tile[0].to(tl.float32), 0)[None, :]
    dq_head = head_of(dq, dq_strides, b, h, q_from, UNIT)
    dq_head += first_query.to(tl.int64) * dq_strides[2] * UNIT
    store_rows(dq_head, dq_strides[2], row, query < N, sum1 * scale, 0, D, UNIT)
    if D2 > 0:
        sum2 -= share * tl.sum(k_tile[1].to(tl.float32), 0)[None, :]
        store_rows(dq_head, dq_strides[2], row, query < N, sum2 * scale, D1, D, UNIT)


@triton.jit
def _attention_grad_keys(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    grad,
    grad_strides,
    exponents,
    delta,
    mask,
    mask_strides,
    q_starts,
    k_starts,
    rows,
    seed,
    drop_below,
    kept_factor,
    dk,
    dk_strides,
    dv,
    dv_strides,
    N,
    M,
    heads,
    group,
    scale,
    scale_of_two,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_OF_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    E1: tl.constexpr,
    E2: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_K keys of one head against all queries that see them, of each of the
    `group` heads that share it in turn. Scores stand with keys as rows."""
    block, b, h = place(M, heads // group, BLOCK_K)
    row = tl.arange(0, BLOCK_K)
    first_key = block * BLOCK_K
    key = first_key + row
    q_from = 0
    k_from = 0
    if VARLEN:
        q_from, k_from, N, M = span(q_starts, k_starts, rows, b, N, M)
        N = tl.where(first_key < M, N, 0)  # beyond the last key nothing is to be done
    k_head = head_of(k, k_strides, b, h, k_from, UNIT)
    k_tile = load_tile(k_head, k_strides[2], first_key, BLOCK_K, M, True, D, D1, D2, UNIT)
    v_head = head_of(v, v_strides, b, h, k_from, UNIT)
    v_tile = load_tile(v_head, v_strides[2], first_key, BLOCK_K, M, True, E, E1, E2, UNIT)

    k_sum1 = tl.zeros([BLOCK_K, D1], tl.float32)
    k_sum2 = zeros_of(BLOCK_K, D2)
    v_sum1 = tl.zeros([BLOCK_K, E1], tl.float32)
    v_sum2 = zeros_of(BLOCK_K, E2)
    query_blocks = tl.cdiv(N, BLOCK_Q)
    diagonal = 0
    whole = 0
    if CAUSAL:  # keys are seen by queries from their own place on, all of them from the last one's
        diagonal = tl.minimum(first_key // BLOCK_Q, query_blocks)
        whole = tl.minimum(tl.cdiv(first_key + BLOCK_K - 1, BLOCK_Q), query_blocks)
    # Blocks of queries on the diagonal, then those that see all keys.
    for EDGE in tl.static_range(1 if CAUSAL else 0, -1, -1):
        first = diagonal if EDGE else whole
        blocks = (whole if EDGE else query_blocks) - first
        for step in range(0, blocks * group):
            q_h = h * group + step // blocks
            start = (first + step % blocks) * BLOCK_Q
            query = start + tl.arange(0, BLOCK_Q)
            # Beyond the last query the exponent is +inf and all weights are zero.
            at = row_terms_at(b, q_h, q_from, heads, N, rows, VARLEN) + query
            exponent = tl.load(exponents + at, mask=query < N, other=float("inf"))[None, :]
            row_delta = tl.load(delta + at, mask=query < N, other=0.0)[None, :]
            q_head = head_of(q, q_strides, b, q_h, q_from, UNIT)
            q_tile = load_tile(q_head, q_strides[2], start, BLOCK_Q, N, True, D, D1, D2, UNIT)
            g_head = head_of(grad, grad_strides, b, q_h, q_from, UNIT)
            g_tile = load_tile(g_head, grad_strides[2], start, BLOCK_Q, N, True, E, E1, E2, UNIT)
            scores = dot_rows(k_tile, q_tile, BLOCK_K, BLOCK_Q, D2, PRECISION) * scale_of_two
            scores = masked(
                scores,
                mask + b.to(tl.int64) * mask_strides[0] + q_h.to(tl.int64) * mask_strides[1],
                mask_strides,
                query[None, :],
                key[:, None],
                N,
                M,
                MASK,
                MASK_OF_KEYS,
                EDGE == 1,
                False,
            )
            weights = tl.exp2(scores - exponent)
            rounded = weights
            if DROPOUT:
                kept = kept_weights(
                    seed, drop_below, b, q_h, heads, start, first_key, BLOCK_Q, BLOCK_K
                )
                kept = tl.trans(kept)
                rounded = tl.where(kept, weights * kept_factor, 0.0)
            rounded = rounded.to(q.dtype.element_ty)
            v_sum1 = tl.dot(rounded, g_tile[0], v_sum1, input_precision=PRECISION)
            if E2 > 0:
                v_sum2 = tl.dot(rounded, g_tile[1], v_sum2, input_precision=PRECISION)
            slopes = dot_rows(v_tile, g_tile, BLOCK_K, BLOCK_Q, E2, PRECISION)
            if DROPOUT:
                slopes = tl.where(kept, slopes * kept_factor, 0.0)
            slopes = (weights * (slopes - row_delta)).to(q.dtype.element_ty)
            k_sum1 = tl.dot(slopes, q_tile[0], k_sum1, input_precision=PRECISION)
            if D2 > 0:
                k_sum2 = tl.dot(slopes, q_tile[1], k_sum2, input_precision=PRECISION)

    dk_head = head_of(dk, dk_strides, b, h, k_from, UNIT)
    dk_head += first_key.to(tl.int64) * dk_strides[2] * UNIT
    store_rows(dk_head, dk_strides[2], row, key < M, k_sum1 * scale, 0, D, UNIT)
    if D2 > 0:
        store_rows(dk_head, dk_strides[2], row, key < M, k_sum2 * scale, D1, D, UNIT)
    dv_head = head_of(dv, dv_strides, b, h, k_from, UNIT)
    dv_head += first_key.to(tl.int64) * dv_strides[2] * UNIT
    store_rows(dv_head, dv_strides[2], row, key < M, v_sum1, 0, E, UNIT)
    if E2 > 0:
        store_rows(dv_head, dv_strides[2], row, key < M, v_sum2, E1, E, UNIT)
