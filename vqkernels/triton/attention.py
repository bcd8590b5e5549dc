"""Launch of `attention`: online softmax over tiles of keys, nothing of size N x M is written.

Floors, for one H100 (989 TFLOP/s in half precision; 132 multiprocessors of 16 exponentials a cycle
at 1.755 GHz), B H = 96, N = M = 4096, d = 64, not causal:

    products      4 B H N M d = 0.41 TFLOP: 0.42 ms
    exponentials  B H N M / (132 16 1.755 GHz): 0.43 ms, which is why two programs should share a
                  multiprocessor: one's exponentials run beside the other's products
    bytes         q, k, v, out once: 0.2 GB, 0.06 ms

A head of 72 columns is read and multiplied as 64 + 16 (`parts_of`), not as 128: the products cost
80 / 72 of their floor instead of 128 / 72.

fp32 is exact without TF32: Triton's "bf16x6" splits both operands into three bf16 terms and sums,
in fp32, the six products that reach 2^-24 of the whole, the small ones first. Six half-precision
products take 989 / 6 = 165 TFLOP/s, fp32 lanes ("ieee") 67 at most, and large IEEE tiles compile
into thousands of multiply-adds that spill.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference import attention as reference
from vqkernels.reference.attention import like_queries
from vqkernels.triton.attention_configs import AttentionConfig, Parts, parts_of, select_attention
from vqkernels.triton.launch import device_facts, launch

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# Added in place of anything below it: finfo.min, a usual "no", stays finite as an exponent of two.
_LEAST_BIAS = tl.constexpr(-3.0e38)
DROPOUT_STREAM = tl.constexpr(reference.DROPOUT_STREAM)
NO_MASK, BOOLEAN, ADDED = (tl.constexpr(value) for value in range(3))

Strides = tuple[int, int, int]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`[B, H, N, e]` in q's dtype and the softmax's denominator, fp32 logarithm `[B, H, N]`.

    Args:
        q, k, v: `[B, H, N, d]`, `[B, Hk, M, d]`, `[B, Hk, M, e]`, Hk divides H.
        attn_mask: `[B, H, N, M]`, any strides, bool or q's dtype.
        config: launch configuration instead of the table's.
    """
    out = like_queries(q, v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    forward(q, k, v, out, lse, attn_mask, is_causal, scale, dropout_p, seed, config=config)
    return out, lse


class Sequences(NamedTuple):
    """Where sequences of varying length start among the queries and keys of a single sample."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def forward(
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
    config: AttentionConfig | None = None,
) -> None:
    """Fills `out` and `lse`."""
    if lse.numel() == 0 or v.shape[-1] == 0:
        return
    q, k, v = (rows_beside(t) for t in (q, k, v))
    unit = common_unit(q, k, v, out)
    config = config or choose("forward", q, v, attn_mask, seed is not None)
    batch, queries, keys = sizes_of(q, k, sequences)
    heads = q.shape[1]
    launch(
        _attention_forward,
        triton.cdiv(queries, config.block_q) * batch * heads,
        q,
        strides_of(q, unit),
        k,
        strides_of(k, unit),
        v,
        strides_of(v, unit),
        out,
        strides_of(out, unit),
        lse,
        *mask_arguments(attn_mask, q),
        *starts_of(q, k, sequences),
        *dropout_arguments(q, dropout_p, seed),
        queries,
        keys,
        heads,
        heads // k.shape[1],
        scale * _LOG2_E.value,
        UNIT=unit,
        SHIFTED=scale <= 0 or mask_kind(attn_mask) == ADDED,
        CAUSAL=is_causal,
        VARLEN=sequences is not None,
        DROPOUT=seed is not None,
        **modes(q, v, attn_mask),
        **tiles(config, seed is not None),
    )


def sizes_of(q: Tensor, k: Tensor, sequences: Sequences | None) -> tuple[int, int, int]:
    """How many sequences there are, and the most queries and keys of one."""
    if sequences is None:
        return q.shape[0], q.shape[2], k.shape[2]
    return len(sequences.cu_seqlens_q) - 1, sequences.max_seqlen_q, sequences.max_seqlen_k


def starts_of(
    q: Tensor, k: Tensor, sequences: Sequences | None
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Starts of queries and keys, and how many rows there are of each."""
    if sequences is None:
        return q, q, (0, 0)
    starts = (sequences.cu_seqlens_q.contiguous(), sequences.cu_seqlens_k.contiguous())
    return *starts, (q.shape[2], k.shape[2])


def choose(
    kernel: str, q: Tensor, v: Tensor, attn_mask: Tensor | None, dropout: bool
) -> AttentionConfig:
    dim = max(parts_of(q.shape[-1]).padded, parts_of(v.shape[-1]).padded)
    products = "split" if q.dtype == torch.float32 else "half"
    crowded = dropout or (attn_mask is not None and not is_of_keys(attn_mask))
    return select_attention(kernel, device_facts(q.device).capability, products, dim, crowded)


def rows_beside(t: Tensor) -> Tensor:
    """`t`, or a copy whose columns are neighbours in memory."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def common_unit(*tensors: Tensor) -> int:
    """The elements of 16 bytes where every row of every tensor starts at a multiple of them, else
    1: strides are passed as multiples of it, so that Triton sees the alignment of heads of 72."""
    unit = 16 // tensors[0].element_size()
    fits = all(stride % unit == 0 for t in tensors for stride in strides_of(t, 1))
    return unit if fits else 1


def strides_of(t: Tensor, unit: int) -> Strides:
    """Strides between batches, heads and rows, 0 where there is only one."""
    strides = t.stride()
    return tuple(strides[dim] // unit if t.shape[dim] > 1 else 0 for dim in range(3))  # type: ignore[return-value]


def mask_kind(attn_mask: Tensor | None) -> tl.constexpr:
    if attn_mask is None:
        return NO_MASK
    return BOOLEAN if attn_mask.dtype == torch.bool else ADDED


def mask_arguments(attn_mask: Tensor | None, q: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if attn_mask is None:
        return q, (0, 0, 0, 0)
    pointer = attn_mask.view(torch.uint8) if attn_mask.dtype == torch.bool else attn_mask
    strides = zip(attn_mask.stride(), attn_mask.shape, strict=True)
    return pointer, tuple(stride if size > 1 else 0 for stride, size in strides)


def is_of_keys(attn_mask: Tensor) -> bool:
    """Whether all queries of a head share one row of the mask."""
    return attn_mask.shape[2] < 2 or attn_mask.stride(2) == 0


def dropout_arguments(
    q: Tensor, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, int, float]:
    """The seed, what numbers of dropped weights are below, and the factor of the others."""
    return q if seed is None else seed, round(dropout_p * 65536), 1 / (1 - dropout_p)


def modes(q: Tensor, v: Tensor, attn_mask: Tensor | None) -> dict[str, Any]:
    """Constants that every kernel takes."""
    d: Parts = parts_of(q.shape[-1])
    e: Parts = parts_of(v.shape[-1])
    mask = mask_kind(attn_mask).value
    # The interpreter multiplies fp32 as it is and knows no name for the split.
    split = q.dtype == torch.float32 and q.device.type != "cpu"
    return {
        "MASK": mask,
        "MASK_OF_KEYS": attn_mask is not None and is_of_keys(attn_mask),
        "PRECISION": "bf16x6" if split else "ieee",
        "D": q.shape[-1],
        "D1": d.first,
        "D2": d.second,
        "E": v.shape[-1],
        "E1": e.first,
        "E2": e.second,
    }


def tiles(config: AttentionConfig, dropout: bool) -> dict[str, int | None]:
    """Dropout's random words do not fit within registers that a row was limited to."""
    return {
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": None if dropout else config.registers or None,
    }


@triton.jit
def _attention_forward(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    out,
    out_strides,
    lse,
    mask,
    mask_strides,
    q_starts,
    k_starts,
    rows,
    seed,
    drop_below,
    kept_factor,
    N,
    M,
    heads,
    group,
    scale,
    UNIT: tl.constexpr,
    SHIFTED: tl.constexpr,
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
    """One program: BLOCK_Q queries of one head against all keys that they see.

    scale: of the scores, times log2(e): the softmax is in powers of two.
    SHIFTED: scores are scaled, and `mask` added, before their maximum; else a positive scale is
    multiplied in as the exponent is formed.
    VARLEN: b is a sequence instead of a sample, N and M are the longest one's.
    """
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
    q_head += first_query.to(tl.int64) * q_strides[2] * UNIT
    q_tile = load_rows(q_head, q_strides[2], row, query < N, True, D, D1, D2, UNIT)
    k_head = head_of(k, k_strides, b, h // group, k_from, UNIT)
    v_head = head_of(v, v_strides, b, h // group, k_from, UNIT)
    mask += b.to(tl.int64) * mask_strides[0] + h.to(tl.int64) * mask_strides[1]

    end = M
    whole = M // BLOCK_K * BLOCK_K
    if CAUSAL:
        end = tl.minimum(M, first_query + BLOCK_Q)
        whole = tl.minimum(M, first_query + 1) // BLOCK_K * BLOCK_K
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sum1 = tl.zeros([BLOCK_Q, E1], tl.float32)
    sum2 = zeros_of(BLOCK_Q, E2)
    # Keys that every query sees, then those at the end of M or on the diagonal.
    for EDGE in tl.static_range(2):
        first = whole if EDGE else 0
        last = end if EDGE else whole
        for start in range(first, last, BLOCK_K):
            key = start + tl.arange(0, BLOCK_K)
            k_tile = load_tile(k_head, k_strides[2], start, BLOCK_K, M, EDGE, D, D1, D2, UNIT)
            scores = dot_rows(q_tile, k_tile, BLOCK_Q, BLOCK_K, D2, PRECISION)
            if SHIFTED:
                scores = scores * scale
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
            highest = tl.max(scores, 1)
            if not SHIFTED:
                highest = highest * scale
            risen = tl.maximum(top, highest)
            # A query that has not seen a key yet: its exponents stay -inf.
            shift = tl.where(risen == float("-inf"), 0.0, risen)
            if SHIFTED:
                exponents = scores - shift[:, None]
            else:
                exponents = tl.fma(scores, scale, -shift[:, None])
            weights = tl.exp2(exponents)
            faded = tl.exp2(top - shift)
            total = total * faded + tl.sum(weights, 1)
            top = risen
            if DROPOUT:
                kept = kept_weights(
                    seed, drop_below, b, h, heads, first_query, start, BLOCK_Q, BLOCK_K
                )
                weights = tl.where(kept, weights, 0.0)
            v_tile = load_tile(v_head, v_strides[2], start, BLOCK_K, M, EDGE, E, E1, E2, UNIT)
            weights = weights.to(v.dtype.element_ty)
            sum1 = tl.dot(weights, v_tile[0], sum1 * faded[:, None], input_precision=PRECISION)
            if E2 > 0:
                sum2 = tl.dot(weights, v_tile[1], sum2 * faded[:, None], input_precision=PRECISION)

    factor = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    if DROPOUT:
        factor *= kept_factor
    out_head = head_of(out, out_strides, b, h, q_from, UNIT)
    out_head += first_query.to(tl.int64) * out_strides[2] * UNIT
    store_rows(out_head, out_strides[2], row, query < N, sum1 * factor, 0, E, UNIT)
    if E2 > 0:
        store_rows(out_head, out_strides[2], row, query < N, sum2 * factor, E1, E, UNIT)
    at = row_terms_at(b, h, q_from, heads, N, rows, VARLEN) + query
    tl.store(lse + at, (top + tl.log2(total)) * _LN_2, mask=query < N)


@triton.jit
def place(N, heads, BLOCK: tl.constexpr):
    """(block of rows, batch, head) of a program; the blocks of one head stand next to each other,
    so that they read the same keys at the same time."""
    blocks = tl.cdiv(N, BLOCK)
    head = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, head // heads, head % heads


@triton.jit
def span(q_starts, k_starts, rows, b, N, M):
    """A sequence's first query and key, and how many it has, at most N and M. `rows` are those of
    all queries and keys; no starts lead beyond them."""
    q_from, queries = _stretch(q_starts, b, rows[0], N)
    k_from, keys = _stretch(k_starts, b, rows[1], M)
    return q_from, k_from, queries, keys


@triton.jit
def _stretch(starts, b, rows, most):
    first = tl.minimum(tl.maximum(tl.load(starts + b), 0), rows)
    end = tl.minimum(tl.load(starts + b + 1), rows)
    return first, tl.minimum(tl.maximum(end - first, 0), most)


@triton.jit
def row_terms_at(b, h, q_from, heads, N, rows, VARLEN: tl.constexpr):
    """Where a head has what is kept of each of its queries: lse, exponents, delta."""
    if VARLEN:
        return h.to(tl.int64) * rows[0] + q_from
    else:
        return (b.to(tl.int64) * heads + h) * N


@triton.jit
def head_of(x, strides, b, h, first, UNIT: tl.constexpr):
    """Row `first` of head h of sample b; sequences of varying length are rows of one sample, whose
    stride is 0."""
    at = b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    return x + (at + tl.cast(first, tl.int64) * strides[2]) * UNIT


@triton.jit
def load_tile(
    head,
    stride,
    start,
    BLOCK: tl.constexpr,
    limit,
    EDGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Rows start, start + 1, ... of a head in one or two parts; with EDGE zeros from `limit` on."""
    row = tl.arange(0, BLOCK)
    head += tl.cast(start, tl.int64) * stride * UNIT
    return load_rows(head, stride, row, start + row < limit, EDGE, COLUMNS, FIRST, SECOND, UNIT)


@triton.jit
def load_rows(
    head,
    stride,
    row,
    inside,
    EDGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The parts [rows, FIRST] and [rows, SECOND] of rows; without a second the first twice."""
    first = _load_part(head, stride, row, inside, EDGE, 0, FIRST, COLUMNS, UNIT)
    second = first
    if SECOND > 0:
        second = _load_part(head, stride, row, inside, EDGE, FIRST, SECOND, COLUMNS, UNIT)
    return first, second


@triton.jit
def _load_part(
    head,
    stride,
    row,
    inside,
    EDGE: tl.constexpr,
    FROM: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):
    column = FROM + tl.arange(0, WIDTH)
    at = head + (row.to(tl.int64)[:, None] * stride * UNIT + column[None, :])
    if EDGE and FROM + WIDTH > COLUMNS:
        return tl.load(at, mask=inside[:, None] & (column < COLUMNS)[None, :], other=0.0)
    elif EDGE:
        return tl.load(at, mask=inside[:, None], other=0.0)
    elif FROM + WIDTH > COLUMNS:
        return tl.load(at, mask=(column < COLUMNS)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(
    head, stride, row, inside, values, FROM: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr
):
    column = FROM + tl.arange(0, values.shape[1])
    at = head + (row.to(tl.int64)[:, None] * stride * UNIT + column[None, :])
    values = values.to(head.dtype.element_ty)
    tl.store(at, values, mask=inside[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def zeros_of(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of a second part; where there is none nobody reads them."""
    if WIDTH > 0:
        return tl.zeros([ROWS, WIDTH], tl.float32)
    else:
        return tl.zeros([ROWS, 16], tl.float32)


@triton.jit
def dot_rows(
    a,
    b,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a b^T of two pairs of parts."""
    product = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    product = tl.dot(a[0], tl.trans(b[0]), product, input_precision=PRECISION)
    if SECOND > 0:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision=PRECISION)
    return product


@triton.jit
def kept_weights(
    seed, drop_below, b, h, heads, query, key, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Which weights of a tile dropout keeps, [BLOCK_Q, BLOCK_K]. One counter (key / 8, query, head,
    stream) serves eight keys, each of its words two of them, the low half first; `key` is a
    multiple of eight."""
    zero = tl.zeros([BLOCK_Q, BLOCK_K // 8], tl.uint32)
    octet = zero + (key // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)[None, :]
    row = zero + (query + tl.arange(0, BLOCK_Q)).to(tl.uint32)[:, None]
    head = zero + (b * heads + h).to(tl.uint32)
    stream = zero + DROPOUT_STREAM
    w0, w1, w2, w3 = tl.philox(tl.load(seed), octet, row, head, stream)
    # The last of what is joined changes fastest: the half, then the word's low and its high bit.
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    numbers = tl.reshape(tl.join(low, high), [BLOCK_Q, BLOCK_K])
    return numbers.to(tl.int32) >= drop_below


@triton.jit
def masked(
    scores,
    mask,
    mask_strides,
    query,
    key,
    N,
    M,
    MASK: tl.constexpr,
    MASK_OF_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Scores with the mask applied, -inf where a query must not see a key or, with EDGE, where
    there is no key. `query` and `key` span the scores, either of them the rows."""
    if MASK != NO_MASK:
        inside = key < M
        at = key.to(tl.int64) * mask_strides[3]
        if not MASK_OF_KEYS:
            inside = inside & (query < N)
            at += query.to(tl.int64) * mask_strides[2]
        given = tl.load(mask + at, mask=inside, other=0)
        if MASK == ADDED:
            bias = given.to(tl.float32)
            least = tl.where(bias == float("-inf"), bias, _LEAST_BIAS)
            scores += tl.maximum(bias * _LOG2_E, least)
        else:
            scores = tl.where(given != 0, scores, float("-inf"))
    if EDGE:
        scores = tl.where(key < M, scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(key <= query, scores, float("-inf"))
    return scores
