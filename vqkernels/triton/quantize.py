"""Launches of `quantize`: the search, then one pass over x that writes codes, losses and counts.

Floor of the second pass: x and the chosen codes read once, the result written once.
Losses are summed per program and the programs' sums in order, counts with integer atomics: both
give the same bits on every run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch
from vqkernels.triton.nearest_code import nearest_code
from vqkernels.triton.rows import filled, row_grid, row_offsets

# Elements of a tile: 32 a thread of four warps.
_TILE = 4096
_BLOCK = 1024


def quantize(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    mask: Tensor | None,
    gradient: str,
    packed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(quantized, indices, commitment_loss, codebook_loss, counts); see `vqkernels.quantize`."""
    indices = nearest_code(x, codebook, metric)
    quantized = torch.empty_like(x)
    counts = x.new_zeros(codebook.shape[:-1], dtype=torch.float32)
    commitment_loss = x.new_zeros((), dtype=torch.float32)
    codebook_loss = x.new_zeros((), dtype=torch.float32)
    result = (quantized, indices, commitment_loss, codebook_loss, counts)
    if indices.numel() == 0:
        return result
    grouped = codebook.dim() == 3
    books = codebook if grouped else codebook[None]
    groups, size, dim = books.shape
    rows = row_grid([x, quantized], grouped)
    block_d = min(128, triton.next_power_of_2(dim))
    tile_rows = _TILE // block_d
    programs = triton.cdiv(rows.per_group, tile_rows) * groups
    partial_loss = x.new_empty(programs, dtype=torch.float32)
    partial_found = x.new_empty(programs, dtype=torch.int32)
    integer_counts = torch.zeros_like(counts, dtype=torch.int32)
    launch(
        _write_codes,
        programs,
        rows.tensors[0],
        rows.strides[0],
        rows.tensors[1],
        rows.strides[1],
        books,
        books.stride(),
        indices,
        indices if mask is None else mask.contiguous().view(torch.uint8),
        rows.label_strides,
        partial_loss,
        partial_found,
        integer_counts,
        rows.sizes,
        size,
        dim,
        MASKED=mask is not None,
        ROWS=tile_rows,
        BLOCK_D=block_d,
        num_warps=4,
    )
    launch(
        _close,
        triton.cdiv(groups * size, _BLOCK),
        partial_loss,
        partial_found,
        programs,
        integer_counts,
        groups * size,
        counts,
        commitment_loss,
        codebook_loss,
        dim,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    filled(quantized, rows, 1)
    return result


@triton.jit
def _write_codes(
    x,
    x_strides,
    quantized,
    quantized_strides,
    books,
    book_strides,
    indices,
    mask,
    label_strides,
    partial_loss,
    partial_found,
    counts,
    sizes,
    K,
    D,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: ROWS rows of one book, all their columns."""
    blocks = tl.cdiv(sizes[0], ROWS)
    g = tl.program_id(0) // blocks
    r = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = r < sizes[0]
    label_at = row_offsets(g, r, sizes, label_strides)
    index = tl.load(indices + label_at, mask=inside, other=-1)
    missing = float("nan")
    if MASKED:
        kept = tl.load(mask + label_at, mask=inside, other=0) != 0
        index = tl.where(kept, index, -1)
        tl.store(indices + label_at, index, mask=inside)
        missing = tl.where(kept, float("nan"), 0.0)[:, None]
    found = index >= 0
    tl.atomic_add(counts + g.to(tl.int64) * K + index, 1, mask=found, sem="relaxed")

    x_rows = x + row_offsets(g, r, sizes, x_strides)
    out_rows = quantized + row_offsets(g, r, sizes, quantized_strides)
    codes = books + g.to(tl.int64) * book_strides[0] + tl.where(found, index, 0) * book_strides[1]
    loss = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        column64 = column.to(tl.int64)[None, :]
        inside_d = (column < D)[None, :]
        used = found[:, None] & inside_d
        code = tl.load(codes[:, None] + column64 * book_strides[2], mask=used, other=0.0)
        code = code.to(tl.float32)
        row = tl.load(x_rows[:, None] + column64 * x_strides[4], mask=used, other=0.0)
        difference = row.to(tl.float32) - code
        loss += tl.sum(difference * difference, 1)
        code = tl.where(found[:, None], code, missing)
        out = out_rows[:, None] + column64 * quantized_strides[4]
        tl.store(out, code, mask=inside[:, None] & inside_d)
    tl.store(partial_loss + tl.program_id(0), tl.sum(loss, 0))
    tl.store(partial_found + tl.program_id(0), tl.sum(found.to(tl.int32), 0))


@triton.jit
def _close(
    partial_loss,
    partial_found,
    programs,
    integer_counts,
    codes,
    counts,
    commitment_loss,
    codebook_loss,
    D,
    BLOCK: tl.constexpr,
):
    """fp32 counts; in the first program also the losses' mean."""
    i = tl.arange(0, BLOCK)
    k = tl.program_id(0).to(tl.int64) * BLOCK + i
    count = tl.load(integer_counts + k, mask=k < codes, other=0)
    tl.store(counts + k, count.to(tl.float32), mask=k < codes)
    if tl.program_id(0) == 0:
        total = tl.zeros([BLOCK], tl.float64)
        found = tl.zeros([BLOCK], tl.int32)
        for start in range(0, programs, BLOCK):
            inside = start + i < programs
            total += tl.load(partial_loss + start + i, mask=inside, other=0.0).to(tl.float64)
            found += tl.load(partial_found + start + i, mask=inside, other=0)
        elements = tl.maximum(tl.sum(found, 0), 1).to(tl.float64) * D
        loss = (tl.sum(total, 0) / elements).to(tl.float32)
        tl.store(commitment_loss, loss)
        tl.store(codebook_loss, loss)
