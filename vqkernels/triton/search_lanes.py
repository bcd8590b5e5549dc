"""Nearest code for few dimensions (D <= 16): one row a lane, no tensor cores.

Floor, for one H100 as in search_tiles.py, N = 65536, K = 16384: D multiply-adds and one minimum
for each of the N K scores, at 0.036 ms an operation: 0.33 ms at D = 8, 0.14 ms at D = 3. Padding D
to a tensor-core step and six products would cost more than that in fp32 up to about D = 16; half
inputs go to the tensor cores from D = 5 on.

The index would cost two more operations a score. So it is not carried: for each row the smallest
score of a whole tile is compared with the best so far, and the tile's number is kept (three
operations a tile); the winning tile is searched again at the end (BLOCK_K of K codes).

A tile is [BLOCK_K, BLOCK_N], so that lanes and warps run along the rows, every code is a broadcast,
and the minimum over the codes stays in the lane. Codes are read from `COLUMNS`, negated, so that
one fused multiply-add starting at the bias forms the score.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.triton.rows import row_offsets, search_place, store_found


@triton.jit
def search_lanes(
    x,
    x_strides,
    columns,
    bias,
    indices,
    label_strides,
    scores,
    sizes,
    G,
    K,
    padded,
    splits,
    tiles_per_split,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_N rows of one book against one split's tiles of BLOCK_K codes."""
    split, g, r = search_place(sizes, splits, BLOCK_N)
    inside = r < sizes[0]
    rows = x + row_offsets(g, r, sizes, x_strides)
    stride = padded.to(tl.int64)
    columns += g * D * stride
    bias += g * stride

    entries = ()
    finite = inside
    for d in tl.static_range(D):
        column = tl.full([BLOCK_N], d, tl.int64) * x_strides[4]
        entry = tl.load(rows + column, mask=inside, other=0.0).to(tl.float32)
        finite = finite & (tl.abs(entry) < float("inf"))
        entries = entries + (entry,)  # type: ignore  # noqa: RUF005

    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    best_tile = tl.full([BLOCK_N], -1, tl.int32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, BLOCK_K))
    for tile in range(first, last):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        score = tl.broadcast_to(tl.load(bias + k)[:, None], (BLOCK_K, BLOCK_N))
        for d in tl.static_range(D):
            code = tl.load(columns + d * stride + k)
            score = tl.fma(code[:, None], entries[d][None, :], score)
        low = tl.min(score, 0)
        better = low < best
        best = tl.where(better, low, best)
        best_tile = tl.where(better, tile, best_tile)

    found = finite & (best_tile >= 0)
    index = tl.full([BLOCK_N], -1, tl.int32)
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    for i in range(0, BLOCK_K):
        k = tl.maximum(best_tile, 0) * BLOCK_K + i
        score = tl.load(bias + k)
        for d in tl.static_range(D):
            score = tl.fma(tl.load(columns + d * stride + k), entries[d], score)
        better = score < best
        best = tl.where(better, score, best)
        index = tl.where(better, k, index)
    index = tl.where(found, index, -1)
    store_found(index, best, indices, label_strides, scores, sizes, split, g, r, G, SPLIT)
