"""Sums of rows over the codes they belong to, in a fixed order: statistics and book gradients.

    1. keys   book * K + label for every row, -1 for a row without a code
    2. sort   stable, so that the rows of one code lie together in their original order
    3. starts where each code's rows begin
    4. chunks of CHUNK sorted rows that belong to one code are summed, side by side
    5. totals of each code: its rows before the first whole chunk, its chunks, its rows after

Every sum has one order that depends on the labels alone: no float atomics, the same bits on every
run. A book that has collapsed onto one code costs no more than a balanced one, because of step 4.
Floor: each row is read once (and once more through its key and place, 16 bytes).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch
from vqkernels.triton.rows import Rows, row_offsets

# Rows in one partial sum: N / CHUNK partial sums bound the longest chain of a collapsed book, and
# 2 * CHUNK rows the longest chain of any other.
CHUNK = 256
# Elements of a tile, 32 fp32 registers a thread of four warps.
_TILE = 4096
_BLOCK = 1024


@dataclass(frozen=True)
class Segments:
    """Rows in the order of their codes.

    Attributes:
        keys: int32 `[rows]`, sorted.
        order: int64 `[rows]`, the place `book * per_group + row` of each sorted row.
        starts: int32 `[books * K + 1]`, where each code's rows begin; `starts[0]` rows have none.
    """

    keys: Tensor
    order: Tensor
    starts: Tensor


def segments(indices: Tensor, rows: Rows, codebook_size: int) -> Segments:
    """Group the rows of a row grid by the codes in `indices`, a label for each row."""
    codes = rows.groups * codebook_size
    if codes >= 1 << 31:
        raise ValueError(f"books * codes must be fewer than 2^31, got {codes}")
    total = rows.groups * rows.per_group
    keys = indices.new_empty(total, dtype=torch.int32)
    launch(
        _keys,
        triton.cdiv(rows.per_group, _BLOCK) * rows.groups,
        indices.contiguous(),
        rows.label_strides,
        keys,
        rows.sizes,
        codebook_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    keys, order = torch.sort(keys, stable=True)
    starts = indices.new_empty(codes + 1, dtype=torch.int32)
    launch(
        _starts,
        triton.cdiv(codes + 1, _BLOCK),
        keys,
        starts,
        total,
        codes,
        STEPS=total.bit_length(),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return Segments(keys, order, starts)


def segment_sum(
    found: Segments,
    rows: Rows,
    sums: Tensor,
    *,
    counts: Tensor | None = None,
    weights: Tensor | None = None,
    minuend: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """Fill `sums [G, K, D]` with each code's rows (times `weights`), and `counts [G, K]`.

    With a `minuend [G, K, D]` and a scalar `factor` instead: the sum of (minuend - row), times
    factor * 2 / (number of rows that have a code * D).
    """
    dim = sums.shape[-1]
    total = rows.groups * rows.per_group
    block_d = min(128, triton.next_power_of_2(dim))
    d_blocks = triton.cdiv(dim, block_d)
    chunks = total // CHUNK
    x = rows.tensors[0]
    partial = x.new_empty((chunks, dim), dtype=torch.float32)
    partial_weight = x.new_empty(chunks, dtype=torch.float32)
    book = sums if minuend is None else minuend
    shared = (
        found.keys,
        found.order,
        x,
        rows.strides[0],
        weights if weights is not None else partial_weight,
        rows.label_strides,
        book,
        book.stride(),
        partial,
        partial_weight,
        rows.sizes,
        sums.shape[-2],
        dim,
        d_blocks,
    )
    modes = {
        "WEIGHTED": weights is not None,
        "RESIDUAL": minuend is not None,
        "CHUNK": CHUNK,
        "ROWS": min(CHUNK, _TILE // block_d),
        "BLOCK_D": block_d,
        "num_warps": 4,
    }
    launch(_whole_chunks, chunks * d_blocks, *shared, **modes)
    launch(
        _totals,
        sums.shape[0] * sums.shape[1] * d_blocks,
        *shared,
        found.starts,
        sums,
        sums if counts is None else counts,
        sums if factor is None else factor,
        total,
        COUNTED=counts is not None,
        **modes,
    )


@triton.jit
def _keys(labels, label_strides, keys, sizes, K, BLOCK: tl.constexpr):
    blocks = tl.cdiv(sizes[0], BLOCK)
    g = tl.program_id(0) // blocks
    r = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = r < sizes[0]
    label = tl.load(labels + row_offsets(g, r, sizes, label_strides), mask=inside, other=-1)
    key = tl.where((label >= 0) & (label < K), g * K + label.to(tl.int32), -1)
    tl.store(keys + g.to(tl.int64) * sizes[0] + r, key, mask=inside)


@triton.jit
def _starts(keys, starts, total, codes, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """starts[q] = number of keys below q, by bisection."""
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + total
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        searching = low < high
        below = tl.load(keys + middle, mask=searching, other=0) < q
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
    tl.store(starts + q, low, mask=q <= codes)


@triton.jit
def _whole_chunks(
    keys,
    order,
    x,
    x_strides,
    weights,
    label_strides,
    book,
    book_strides,
    partial,
    partial_weight,
    sizes,
    K,
    D,
    d_blocks,
    WEIGHTED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One chunk of sorted rows and BLOCK_D columns, if the chunk belongs to one code."""
    chunk = tl.program_id(0) // d_blocks
    d_block = tl.program_id(0) % d_blocks
    column = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = chunk * CHUNK
    key = tl.load(keys + begin)
    if (key >= 0) & (key == tl.load(keys + begin + CHUNK - 1)):
        code = _code(book, book_strides, key, column, K, D, RESIDUAL, BLOCK_D)
        total = tl.zeros([BLOCK_D], tl.float64 if RESIDUAL else tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        for at in range(begin, begin + CHUNK, ROWS):
            rows, scale = _rows(
                order, x, x_strides, weights, label_strides, sizes, key // K, code, column,
                at, begin + CHUNK, D, WEIGHTED, RESIDUAL, ROWS,
            )  # fmt: skip
            total += tl.sum(rows.to(total.dtype), 0)
            weight += scale
        tl.store(partial + chunk.to(tl.int64) * D + column.to(tl.int64), total, mask=column < D)
        if d_block == 0:
            tl.store(partial_weight + chunk, tl.sum(weight, 0))


@triton.jit
def _totals(
    keys,
    order,
    x,
    x_strides,
    weights,
    label_strides,
    book,
    book_strides,
    partial,
    partial_weight,
    sizes,
    K,
    D,
    d_blocks,
    starts,
    sums,
    counts,
    factor,
    total_rows,
    COUNTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One code and BLOCK_D columns: rows up to the first whole chunk, chunks, rows after them."""
    key = tl.program_id(0) // d_blocks
    d_block = tl.program_id(0) % d_blocks
    column = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(starts + key)
    end = tl.load(starts + key + 1)
    chunk_begin = tl.cdiv(begin, CHUNK)
    chunk_end = tl.maximum(end // CHUNK, chunk_begin)
    head_end = tl.minimum(chunk_begin * CHUNK, end)
    tail_begin = tl.maximum(chunk_end * CHUNK, head_end)

    code = _code(book, book_strides, key, column, K, D, RESIDUAL, BLOCK_D)
    # Residuals, which cancel, are summed and scaled in float64 and rounded once.
    total = tl.zeros([BLOCK_D], tl.float64 if RESIDUAL else tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for at in range(begin, head_end, ROWS):
        rows, scale = _rows(
            order, x, x_strides, weights, label_strides, sizes, key // K, code, column,
            at, head_end, D, WEIGHTED, RESIDUAL, ROWS,
        )  # fmt: skip
        total += tl.sum(rows.to(total.dtype), 0)
        weight += scale
    for at in range(chunk_begin, chunk_end, ROWS):
        chunk = at + tl.arange(0, ROWS)
        inside = chunk < chunk_end
        where = partial + chunk.to(tl.int64)[:, None] * D + column.to(tl.int64)[None, :]
        part = tl.load(where, mask=inside[:, None] & (column < D)[None, :], other=0.0)
        total += tl.sum(part.to(total.dtype), 0)
        weight += tl.load(partial_weight + chunk, mask=inside, other=0.0)
    for at in range(tail_begin, end, ROWS):
        rows, scale = _rows(
            order, x, x_strides, weights, label_strides, sizes, key // K, code, column,
            at, end, D, WEIGHTED, RESIDUAL, ROWS,
        )  # fmt: skip
        total += tl.sum(rows.to(total.dtype), 0)
        weight += scale

    if RESIDUAL:
        elements = tl.maximum(total_rows - tl.load(starts), 1).to(tl.float64) * D
        total *= 2.0 * tl.load(factor).to(tl.float64) / elements
    tl.store(sums + key.to(tl.int64) * D + column.to(tl.int64), total, mask=column < D)
    if COUNTED and d_block == 0:
        if WEIGHTED:
            tl.store(counts + key, tl.sum(weight, 0))
        else:
            tl.store(counts + key, (end - begin).to(tl.float32))


@triton.jit
def _code(book, book_strides, key, column, K, D, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr):
    """The code that rows are subtracted from."""
    if RESIDUAL:
        at = (key // K).to(tl.int64) * book_strides[0] + (key % K).to(tl.int64) * book_strides[1]
        at = book + at + column.to(tl.int64) * book_strides[2]
        return tl.load(at, mask=column < D, other=0.0).to(tl.float32)
    else:
        return tl.zeros([BLOCK_D], tl.float32)


@triton.jit
def _rows(
    order,
    x,
    x_strides,
    weights,
    label_strides,
    sizes,
    g,
    code,
    column,
    begin,
    end,
    D,
    WEIGHTED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS sorted rows of book g from `begin` on, zero from `end` on, and their weights."""
    place = begin + tl.arange(0, ROWS)
    inside = place < end
    r = tl.load(order + place, mask=inside, other=0) - g.to(tl.int64) * sizes[0]
    r = tl.where(inside, r, 0).to(tl.int32)
    at = x + row_offsets(g, r, sizes, x_strides)[:, None]
    at += column.to(tl.int64)[None, :] * x_strides[4]
    used = inside[:, None] & (column < D)[None, :]
    rows = tl.load(at, mask=used, other=0.0).to(tl.float32)
    scale = tl.where(inside, 1.0, 0.0)
    if RESIDUAL:
        rows = tl.where(used, code[None, :] - rows, 0.0)
    if WEIGHTED:
        at = weights + row_offsets(g, r, sizes, label_strides)
        scale = tl.load(at, mask=inside, other=0.0)
        rows = rows * scale[:, None]
    return rows, scale
