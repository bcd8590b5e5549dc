"""fp32 and fp16 rows as bf16 terms whose sum is the row: what tensor cores multiply exactly.

Floor: x read once and 2 bytes a term and element written, some microseconds against a search of
milliseconds. Written to memory once, because a search that splits x itself keeps the terms in
registers and moves them there anew for every product (seen in the code for sm_90).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.code_terms import three_halves
from vqkernels.triton.launch import launch
from vqkernels.triton.rows import Rows, row_offsets

# 8 significant bits a term, of 8, 11 and 24.
TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}

# Elements of a tile: 32 a thread of four warps.
_TILE = 4096


def native_rows(rows: Rows) -> tuple[Tensor, tuple[int, ...]]:
    """The rows themselves as their only term."""
    return rows.tensors[0], (*rows.strides[0], 0)


def row_terms(rows: Rows) -> tuple[Tensor, tuple[int, ...]]:
    """Terms of the first tensor of a row grid, and their strides (b, m, n, book, column, term).

    An entry that is not finite becomes a NaN in the first term. bf16 rows are their own term.
    """
    x = rows.tensors[0]
    terms = TERMS[x.dtype]
    if terms == 1:
        return native_rows(rows)
    per_group, middle, inner = rows.sizes
    dim = x.shape[-1]
    book = per_group * dim
    result = x.new_empty((terms, rows.groups, per_group, dim), dtype=torch.bfloat16)
    block_d = min(128, triton.next_power_of_2(dim))
    tile_rows = _TILE // block_d
    launch(
        _row_terms,
        triton.cdiv(per_group, tile_rows) * rows.groups * triton.cdiv(dim, block_d),
        x,
        rows.strides[0],
        result,
        rows.sizes,
        dim,
        rows.groups * book,
        TERMS=terms,
        ROWS=tile_rows,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return result, (middle * inner * dim, inner * dim, dim, book, 1, rows.groups * book)


@triton.jit
def _row_terms(
    x,
    x_strides,
    result,
    sizes,
    D,
    term,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d_blocks = tl.cdiv(D, BLOCK_D)
    block = tl.program_id(0) // d_blocks
    blocks = tl.cdiv(sizes[0], ROWS)
    g = block // blocks
    r = block % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    column64 = column.to(tl.int64)[None, :]
    inside = (r < sizes[0])[:, None] & (column < D)[None, :]
    at = x + row_offsets(g, r, sizes, x_strides)[:, None]
    value = tl.load(at + column64 * x_strides[4], mask=inside, other=0.0)
    value = value.to(tl.float32)
    finite = tl.abs(value) < float("inf")
    high, middle, low = three_halves(tl.where(finite, value, 0.0))
    row = g.to(tl.int64) * sizes[0] + r
    out = result + row[:, None] * D + column64
    tl.store(out, tl.where(finite, high.to(tl.float32), float("nan")), mask=inside)
    tl.store(out + term, middle, mask=inside)
    if TERMS == 3:
        tl.store(out + term + term, low, mask=inside)
