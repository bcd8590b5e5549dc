"""Launches of `nearest_code`: terms of the book, one search, one merge where K was split.

Few dimensions in fp32 go to `search_lanes` (registers), everything else to `search_tiles` (tensor
cores). Neither forms the N x K matrix; the extra memory is the book's terms (at most 6 bytes for
each of its elements), an fp32 row's terms (6 bytes an element) and 8 bytes a row for each split of
K.

Scores are fp32 numbers, which bounds what is exact: |x| |c| and, for l2, |c|^2 must stay below
1.7e38 and 3.4e38 (fp16 cannot leave that range). A code that is longer takes part as if |c|^2 were
3.4e38, so that it loses to codes near a row of ordinary size and wins where it is the only one.
Where x.c itself overflows the choice is undefined, -1 included. The reference, in float64, has no
such limits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vqkernels.triton.code_terms import COLUMNS, NATIVE, PLANES, code_terms
from vqkernels.triton.configs import (
    LaneConfig,
    TileConfig,
    block_of,
    select_lanes,
    select_tiles,
)
from vqkernels.triton.launch import device_facts, launch
from vqkernels.triton.row_terms import TERMS, native_rows, row_terms
from vqkernels.triton.rows import Rows, row_grid
from vqkernels.triton.search_lanes import search_lanes
from vqkernels.triton.search_tiles import merge_splits, search_tiles

# A split searches at least this many tiles, so that reading its rows is paid for.
_LEAST_TILES = 4
_MERGE_ROWS = 256

# Half-precision products are exact in fp32 and the tensor core's smallest step is 16 columns: up to
# this D the fp32 multiply-adds of `search_lanes` are fewer than the operations of a tile's minimum.
_LANES_FOR_HALF = 4


@dataclass(frozen=True)
class _Splits:
    count: int
    tiles: int


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    precision: str = "exact",
    packed: Tensor | None = None,
    *,
    config: TileConfig | LaneConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """Index of each row's nearest code, int64 of x's shape without D; see `vqkernels.nearest_code`.

    Args:
        x, codebook, metric: as the public function has checked them; float32, float16, bfloat16.
        precision, packed: accepted for the op's schema; every search is exact, and preparing the
            book is part of each call.
        config: launch configuration instead of the table's.
        splits: number of parts that K is split into instead of the number that fills the GPU.
    """
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    if indices.numel() == 0:
        return indices
    books = codebook if codebook.dim() == 3 else codebook[None]
    rows = row_grid([x], codebook.dim() == 3)
    facts = device_facts(x.device)
    config = config or _select(rows, books, facts.capability)
    blocks = triton.cdiv(rows.per_group, config.block_n) * rows.groups
    tiles = triton.cdiv(books.shape[1], config.block_k)
    split = _split(tiles, splits or config.programs * facts.multiprocessors // blocks)
    if split.count == 1:
        found, scores = indices, indices
    else:
        shape = (split.count, rows.groups, rows.per_group)
        scores = x.new_empty(shape, dtype=torch.float32)
        found = x.new_empty(shape, dtype=torch.int32)
    if isinstance(config, LaneConfig):
        _search_lanes(rows, books, metric, config, split, blocks, found, scores)
    else:
        _search_tiles(rows, books, metric, config, split, blocks, found, scores)
    if split.count > 1:
        launch(
            merge_splits,
            triton.cdiv(rows.per_group, _MERGE_ROWS) * rows.groups,
            scores,
            found,
            indices,
            rows.label_strides,
            rows.sizes,
            rows.groups,
            split.count,
            BLOCK=_MERGE_ROWS,
            num_warps=4,
        )
    return indices


def _select(rows: Rows, books: Tensor, capability: int) -> TileConfig | LaneConfig:
    dim = books.shape[-1]
    half = books.dtype != torch.float32
    if dim <= (_LANES_FOR_HALF if half else 16):
        return select_lanes(dim)
    return select_tiles(capability, "native" if half else "split", dim, rows.per_group)


def _split(tiles: int, wanted: int) -> _Splits:
    count = max(1, min(wanted, tiles // _LEAST_TILES))
    each = triton.cdiv(tiles, count)
    return _Splits(triton.cdiv(tiles, each), each)


def _search_lanes(
    rows: Rows,
    books: Tensor,
    metric: str,
    config: LaneConfig,
    split: _Splits,
    blocks: int,
    found: Tensor,
    scores: Tensor,
) -> None:
    _, size, dim = books.shape
    terms = code_terms(books, metric, COLUMNS)
    launch(
        search_lanes,
        blocks * split.count,
        rows.tensors[0],
        rows.strides[0],
        terms.form,
        terms.bias,
        found,
        rows.label_strides,
        scores,
        rows.sizes,
        rows.groups,
        size,
        terms.bias.shape[-1],
        split.count,
        split.tiles,
        D=dim,
        SPLIT=split.count > 1,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=1,
    )


def _search_tiles(
    rows: Rows,
    books: Tensor,
    metric: str,
    config: TileConfig,
    split: _Splits,
    blocks: int,
    found: Tensor,
    scores: Tensor,
) -> None:
    _, size, dim = books.shape
    split_products = config.products == "split"
    dtype = rows.tensors[0].dtype
    if not split_products and dtype != books.dtype:
        raise ValueError(
            f"a configuration for native products needs x and codebook of one dtype, got {dtype} "
            f'and {books.dtype}; one with products="split" takes both'
        )
    x, x_strides = row_terms(rows) if split_products else native_rows(rows)
    terms = code_terms(books, metric, PLANES if split_products else NATIVE)
    codes = terms.form
    block_d = min(config.block_d, block_of(dim))
    launch(
        search_tiles,
        blocks * split.count,
        x,
        x_strides,
        codes,
        codes.stride() if split_products else (0, *codes.stride()),
        terms.bias,
        terms.scale,
        found,
        rows.label_strides,
        scores,
        rows.sizes,
        rows.groups,
        size,
        terms.bias.shape[-1],
        dim,
        split.count,
        split.tiles,
        SCALED=metric == "cosine" and not split_products,
        X_TERMS=TERMS[dtype] if split_products else 0,
        RESIDENT=dim <= block_d,
        WHOLE_D=dim % block_d == 0,
        SPLIT=split.count > 1,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_D=block_d,
        LANES=config.lanes,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
