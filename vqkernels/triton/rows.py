"""How tensors of any strides look to a kernel: rows of each book, found by three strides.

Row r of book g lies at `b * strides[0] + m * strides[1] + n * strides[2] + g * strides[3]`, where
`n = r % N`, `m = r // N % M` and `b = r // (N * M)`. Leading dimensions that lie evenly in memory
are merged, so a channel-first feature map `[B, D, H, W]` seen as `[B, H, W, D]` needs no copy.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The common row grid of several tensors that share one shape but for the last dimension.

    Attributes:
        tensors: the tensors, copied only where their strides need more than three levels.
        groups: books, 1 for a single one.
        sizes: (rows of one book, M, N). M and N are 1 where one stride is enough, so that the
            kernel, specialized for them, divides nothing.
        strides: for each tensor (b, m, n, book, column).
        label_strides: (b, m, n, book) of a contiguous tensor with one label a row.
    """

    tensors: tuple[Tensor, ...]
    groups: int
    sizes: tuple[int, int, int]
    strides: tuple[tuple[int, int, int, int, int], ...]
    label_strides: tuple[int, int, int, int]

    @property
    def per_group(self) -> int:
        return self.sizes[0]


def row_grid(tensors: Sequence[Tensor], grouped: bool) -> Rows:
    """Rows of `[..., N, D]`, or of `[..., G, N, D]` where `grouped`; all of one shape."""
    shape = tensors[0].shape
    if tensors[0].numel() // max(shape[-1], 1) >= 1 << 31:
        raise ValueError(f"x must have fewer than 2^31 rows, got shape {list(shape)}")
    group_dim = len(shape) - 3 if grouped else -1
    row_dims = [dim for dim in range(len(shape) - 1) if dim != group_dim]
    levels = _merge(_all_strides(tensors, shape), shape, row_dims)
    if len(levels) > 3:
        tensors = [tensor.contiguous() for tensor in tensors]
        levels = _merge(_all_strides(tensors, shape), shape, row_dims)
    while len(levels) < 3:
        levels.append(_Level(1, (0,) * (len(tensors) + 1)))
    outer, middle, inner = levels
    strides = [
        (
            outer.strides[i],
            middle.strides[i],
            inner.strides[i],
            of_tensor[group_dim] if grouped else 0,
            of_tensor[-1],
        )
        for i, of_tensor in enumerate(_all_strides(tensors, shape))
    ]
    return Rows(
        tuple(tensors),
        shape[group_dim] if grouped else 1,
        (outer.size * middle.size * inner.size, middle.size, inner.size),
        tuple(strides[:-1]),
        strides[-1][:-1],
    )


class _Level(NamedTuple):
    size: int
    strides: tuple[int, ...]


def _all_strides(tensors: Sequence[Tensor], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Strides of each tensor, and last those of a contiguous tensor of labels."""
    labels = [1] * len(shape)
    for dim in range(len(shape) - 3, -1, -1):
        labels[dim] = labels[dim + 1] * shape[dim + 1]
    return [tensor.stride() for tensor in tensors] + [tuple(labels)]


def _merge(
    strides: list[tuple[int, ...]], shape: Sequence[int], dims: Sequence[int]
) -> list[_Level]:
    """Levels of the row grid: neighbouring dimensions as one where every tensor steps evenly."""
    levels: list[_Level] = []
    for dim in dims:
        size = shape[dim]
        if size == 1:
            continue
        step = tuple(of_tensor[dim] for of_tensor in strides)
        if levels and levels[-1].strides == tuple(size * stride for stride in step):
            levels[-1] = _Level(levels[-1].size * size, step)
        else:
            levels.append(_Level(size, step))
    return levels


def filled(result: Tensor, rows: Rows, position: int) -> Tensor:
    """`result`, after a kernel has written the tensor that stands for it in the row grid."""
    written = rows.tensors[position]
    return result if written is result else result.copy_(written)


@triton.jit
def search_place(sizes, splits, BLOCK_N: tl.constexpr):
    """(split, book, rows [BLOCK_N]) of a search's program: all row blocks of one book's split
    stand next to each other, so that they read the same codes at the same time."""
    blocks = tl.cdiv(sizes[0], BLOCK_N)
    split = tl.program_id(0) // blocks % splits
    g = tl.program_id(0) // blocks // splits
    return split, g, tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def store_found(
    index, score, indices, label_strides, scores, sizes, split, g, r, G, SPLIT: tl.constexpr
):
    """Each row's index; with SPLIT score and index of this split, for `merge_splits`."""
    inside = r < sizes[0]
    if SPLIT:
        at = (split.to(tl.int64) * G + g) * sizes[0] + r
        tl.store(scores + at, score, mask=inside)
        tl.store(indices + at, index, mask=inside)
    else:
        at = row_offsets(g, r, sizes, label_strides)
        tl.store(indices + at, index.to(tl.int64), mask=inside)


@triton.jit
def row_offsets(g, r, sizes, strides):
    """int64 offsets of rows r of book g."""
    n = (r % sizes[2]).to(tl.int64)
    rest = r // sizes[2]
    m = (rest % sizes[1]).to(tl.int64)
    b = (rest // sizes[1]).to(tl.int64)
    return b * strides[0] + m * strides[1] + n * strides[2] + g.to(tl.int64) * strides[3]
