"""Launch of `gather_codes`: one read of the chosen codes, one write; the bytes are the floor."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch

# Elements of a tile: 32 a thread of four warps, so that many reads are under way at once.
_TILE = 4096


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    """`[..., D]` codes; an index outside [0, K - 1] gives zeros."""
    books = codebook if codebook.dim() == 3 else codebook[None]
    groups, size, dim = books.shape
    result = codebook.new_empty((*indices.shape, dim))
    if indices.numel() == 0:
        return result
    block_d = min(128, triton.next_power_of_2(dim))
    rows = _TILE // block_d
    launch(
        _gather_codes,
        triton.cdiv(indices.numel(), rows) * triton.cdiv(dim, block_d),
        books,
        books.stride(),
        indices.contiguous(),
        result,
        indices.numel(),
        groups,
        indices.shape[-1] if codebook.dim() == 3 else 1,
        size,
        dim,
        ROWS=rows,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return result


@triton.jit
def _gather_codes(
    books,
    strides,
    indices,
    result,
    total,
    G,
    N,
    K,
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d_blocks = tl.cdiv(D, BLOCK_D)
    place = (tl.program_id(0) // d_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    index = tl.load(indices + place, mask=place < total, other=-1)
    found = (index >= 0) & (index < K)
    code = place // N % G * strides[0] + tl.where(found, index, 0) * strides[1]
    column64 = column.to(tl.int64)[None, :]
    at = books + code[:, None] + column64 * strides[2]
    inside = (column < D)[None, :]
    values = tl.load(at, mask=found[:, None] & inside, other=0.0)
    out = result + place[:, None] * D + column64
    tl.store(out, values, mask=(place < total)[:, None] & inside)
