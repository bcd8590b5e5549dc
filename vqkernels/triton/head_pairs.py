"""Heads' rows as pairs of columns: what `qk_norm_rope` and its gradients share.

A pair is (2 i, 2 i + 1) where interleaved, which is read as whole rows and split in registers, or
(i, i + d / 2), which is read as two halves. d is a constant to the kernels, so that the compiler
sees how far each load is aligned.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile, 16 a thread of four warps, and the most of its tokens.
_TILE, _MOST_ROWS = 2048, 32
# Heads are shared out among programs while there would be fewer.
_PROGRAMS = 512
# Elements of the widest load of half-precision numbers.
_UNIT = 8


class Plan:
    """What both launches share.

    Attributes:
        tables: cos, sin (a tensor that is not read where there is none) and their strides of a
            sample and a token.
        sizes: (heads of q, heads of k, tokens).
        heads: of both together, that one program takes.
        programs: (samples, blocks of heads, tiles of tokens).
    """

    def __init__(
        self,
        heads_of: tuple[Tensor, ...],
        cos: Tensor | None,
        sin: Tensor | None,
        rows: int | None,
    ) -> None:
        q, k = heads_of[:2]
        batch, heads, tokens, dim = q.shape
        self.sizes = (heads, k.shape[1], tokens)
        self._half = triton.next_power_of_2((dim + 1) // 2)
        fits = rows or max(1, min(_MOST_ROWS, _TILE // (2 * self._half)))
        self._rows = min(fits, triton.next_power_of_2(tokens))
        tiles = batch * triton.cdiv(tokens, self._rows)
        every = heads + k.shape[1]
        self.heads = every
        while self.heads > 1 and tiles * triton.cdiv(every, self.heads) < _PROGRAMS:
            self.heads = triton.cdiv(self.heads, 2)
        self.programs = tiles * triton.cdiv(every, self.heads)
        self._rotated, self._dim = cos is not None, dim
        self._unit = math.gcd(_UNIT, *(stride for of in heads_of for stride in of.stride()[:3]))
        self.tables: tuple[Any, ...] = (q, (0, 0), q, (0, 0))
        if cos is not None and sin is not None:
            cos, sin = columns_together(cos), columns_together(sin)
            self.tables = (cos, _table_strides(cos), sin, _table_strides(sin))

    def strides(self, x: Tensor) -> tuple[int, ...]:
        """Of a sample, a head and a token, in units: a kernel that multiplies by what it knows to
        be eight sees that rows of 72 columns begin on 16 bytes."""
        return tuple(stride // self._unit for stride in x.stride()[:3])

    def modes(self, norm: str, interleaved: bool) -> dict[str, Any]:
        return {
            "CENTERED": norm == "layer",
            "NORMED": norm != "none",
            "ROTATED": self._rotated,
            "INTERLEAVED": interleaved,
            "ROWS": self._rows,
            "HALF": self._half,
            "D": self._dim,
            "UNIT": self._unit,
            "num_warps": 4,
        }


def columns_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _table_strides(table: Tensor) -> tuple[int, int]:
    return (table.stride(0) if table.dim() == 3 else 0, table.stride(-2))


@triton.jit
def place_heads(sizes, heads, ROWS: tl.constexpr):
    """(sample, tokens, first and last head) of a program."""
    tiles = tl.cdiv(sizes[2], ROWS)
    every = sizes[0] + sizes[1]
    blocks = tl.cdiv(every, heads)
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles % blocks
    b = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    n = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return b, n, block * heads, tl.minimum(block * heads + heads, every)


@triton.jit
def pair_columns(D: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """Both columns of each pair, and which exist; an odd D ends in half a pair."""
    i = tl.arange(0, HALF)
    half = (D + 1) // 2
    if INTERLEAVED:
        return 2 * i, 2 * i + 1, 2 * i < D, 2 * i + 1 < D
    else:
        return i, half + i, i < half, half + i < D


@triton.jit
def load_angles(
    cos,
    cos_strides,
    sin,
    sin_strides,
    b,
    n,
    inside,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """fp32 `[ROWS, HALF]` of the tables; without a rotation of no meaning."""
    if ROTATED:
        i = tl.arange(0, HALF)
        used = inside[:, None] & (2 * i < D)[None, :]
        i = i.to(tl.int64)[None, :]
        at = cos + b * cos_strides[0] + (n * cos_strides[1])[:, None] + i
        c = tl.load(at, mask=used, other=0.0).to(tl.float32)
        at = sin + b * sin_strides[0] + (n * sin_strides[1])[:, None] + i
        return c, tl.load(at, mask=used, other=0.0).to(tl.float32)
    else:
        return tl.full([ROWS, HALF], 1.0, tl.float32), tl.full([ROWS, HALF], 0.0, tl.float32)


@triton.jit
def load_weights(
    weight, D: tl.constexpr, WEIGHTED: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr
):
    """fp32 `[HALF]` of both columns of each pair."""
    if WEIGHTED:
        first, second, used, used_more = pair_columns(D, INTERLEAVED, HALF)
        w = tl.load(weight + first.to(tl.int64), mask=used, other=0.0).to(tl.float32)
        more = tl.load(weight + second.to(tl.int64), mask=used_more, other=0.0).to(tl.float32)
        return w, more
    else:
        return tl.full([HALF], 1.0, tl.float32), tl.full([HALF], 1.0, tl.float32)


@triton.jit
def load_pairs(x, at, inside, D: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """fp32 `[rows, HALF]` of both columns of each pair, zero where there is nothing."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)
        used = inside[:, None] & (column < D)[None, :]
        pointers = x + at[:, None] + column.to(tl.int64)[None, :]
        value = tl.load(pointers, mask=used, other=0.0).to(tl.float32)
        return tl.split(tl.reshape(value, [at.shape[0], HALF, 2]))
    else:
        first, second, used, used_more = pair_columns(D, INTERLEAVED, HALF)
        pointers = x + at[:, None]
        a = tl.load(
            pointers + first.to(tl.int64)[None, :],
            mask=inside[:, None] & used[None, :],
            other=0.0,
        )
        b = tl.load(
            pointers + second.to(tl.int64)[None, :],
            mask=inside[:, None] & used_more[None, :],
            other=0.0,
        )
        return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(
    x, at, inside, a, b, D: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr
):
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)
        used = inside[:, None] & (column < D)[None, :]
        value = tl.reshape(tl.join(a, b), [at.shape[0], 2 * HALF])
        tl.store(x + at[:, None] + column.to(tl.int64)[None, :], value, mask=used)
    else:
        first, second, used, used_more = pair_columns(D, INTERLEAVED, HALF)
        pointers = x + at[:, None]
        used, used_more = inside[:, None] & used[None, :], inside[:, None] & used_more[None, :]
        tl.store(pointers + first.to(tl.int64)[None, :], a, mask=used)
        tl.store(pointers + second.to(tl.int64)[None, :], b, mask=used_more)


@triton.jit
def normed_pairs(
    a,
    b,
    D: tl.constexpr,
    eps,
    CENTERED: tl.constexpr,
    NORMED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
):
    """Normalized pairs and 1 / deviation [rows, 1]; what the mean's rounding leaves is taken off
    as well."""
    if NORMED:
        share = 1.0 / D
        if CENTERED:
            _, _, used, used_more = pair_columns(D, INTERLEAVED, HALF)
            mean = (tl.sum(a, 1) + tl.sum(b, 1)) * share
            a = tl.where(used[None, :], a - mean[:, None], 0.0)
            b = tl.where(used_more[None, :], b - mean[:, None], 0.0)
            left = (tl.sum(a, 1) + tl.sum(b, 1)) * share
            a = tl.where(used[None, :], a - left[:, None], 0.0)
            b = tl.where(used_more[None, :], b - left[:, None], 0.0)
        square = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        inverse = tl.rsqrt(square * share + eps)[:, None]
        return a * inverse, b * inverse, inverse
    else:
        return a, b, tl.full([a.shape[0], 1], 1.0, tl.float32)
