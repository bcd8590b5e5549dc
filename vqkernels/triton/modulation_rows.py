"""Tokens `[B, N, D]` and the vectors that modulate them, as kernels see them.

A vector `[B, F, D]` serves `each = N / F` consecutive tokens. A *span* is the longest run of tokens
that share every vector of an op (the greatest common divisor of their `each`), and a program stays
within one span: it loads each vector once for all its rows. Per-token vectors make spans of one
row. A row is read whole, in one or two powers of two (`parts_of`), or, beyond what registers hold,
in blocks of columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# The least part that is worth a second load.
_LEAST_PART = 32


class Vector(NamedTuple):
    """A vector's tensor and its strides: of a sample, of a vector, and tokens that each serves."""

    tensor: Tensor
    strides: tuple[int, int, int]

    @property
    def vectors(self) -> int:
        return self.tensor.numel() // self.tensor.shape[-1]


class Tokens(NamedTuple):
    """A tensor of tokens with adjacent columns, and its strides of a sample and a token."""

    tensor: Tensor
    strides: tuple[int, int]


@dataclass(frozen=True)
class Spans:
    """`sizes` (N, tokens of a span, D) and how many spans there are."""

    sizes: tuple[int, int, int]
    count: int

    @property
    def length(self) -> int:
        return self.sizes[1]


def tokens_of(x: Tensor) -> Tokens:
    """Columns apart are copied; any other strides are read in place."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Tokens(x, (x.stride(0), x.stride(1)))


def vector_of(vector: Tensor, tokens: int) -> Vector:
    vector = vector if vector.stride(-1) == 1 else vector.contiguous()
    vectors = vector[:, None] if vector.dim() == 2 else vector
    batch, frame, _ = vectors.stride()
    return Vector(vectors, (batch, frame, tokens // vectors.shape[1]))


def row_of(row: Tensor | None, instead: Tensor) -> Tensor:
    """A weight or bias with adjacent columns, or a tensor that is not read in place of None."""
    return instead if row is None else row.contiguous()


def spans_of(x: Tensor, *vectors: Vector) -> Spans:
    batch, tokens, dim = x.shape
    length = math.gcd(*(vector.strides[2] for vector in vectors))
    return Spans((tokens, length, dim), batch * tokens // length)


def parts_of(dim: int) -> tuple[int, ...]:
    """The one or two powers of two that hold D with the least padding: 1152 is 1024 + 128."""
    whole = 1 << (dim - 1).bit_length()
    first = whole // 2
    second = max(_LEAST_PART, 1 << (dim - first - 1).bit_length()) if dim > first else 0
    return (first, second) if 0 < second < first else (whole,)


def block_of(dim: int, most: int) -> int:
    """A power of two up to `most`, a multiple of which holds D with little padding."""
    block = min(most, 1 << (dim - 1).bit_length())
    while block > 128 and -(-dim // block) * block > 1.0625 * dim:
        block //= 2
    return block


@triton.jit
def columns(start, PARTS: tl.constexpr, PART: tl.constexpr):
    """Columns of a part of the row, from `start` on."""
    if PART == 0:
        return start + tl.arange(0, PARTS[0])
    else:
        return start + PARTS[0] + tl.arange(0, PARTS[1])


@triton.jit
def place(span, first, last, sizes, ROWS: tl.constexpr):
    """Of ROWS tokens of a span from its token `first` on: (sample, tokens of it, which lie before
    the span's token `last`), all in 64 bits."""
    spans = sizes[0] // sizes[1]
    at = first + tl.arange(0, ROWS)
    token = (span % spans * sizes[1]).to(tl.int64) + at
    return (span // spans).to(tl.int64), token, at < last


@triton.jit
def vector_offset(span, sizes, strides):
    """Where the vector that serves a span lies."""
    spans = sizes[0] // sizes[1]
    frame = span % spans * sizes[1] // strides[2]
    return (span // spans).to(tl.int64) * strides[0] + frame.to(tl.int64) * strides[1]


@triton.jit
def _load_part(
    x, at, inside, start, D, PARTS: tl.constexpr, EXACT: tl.constexpr, PART: tl.constexpr
):
    column = columns(start, PARTS, PART)
    used = inside[:, None] if EXACT else inside[:, None] & (column < D)[None, :]
    pointers = x + at[:, None] + column.to(tl.int64)[None, :]
    return tl.load(pointers, mask=used, other=0.0).to(tl.float32)


@triton.jit
def load_rows(x, at, inside, start, D, PARTS: tl.constexpr, EXACT: tl.constexpr):
    """fp32 parts `[ROWS, width]` of the rows at `at`, zero where there is nothing. EXACT: the parts
    end where D does."""
    if len(PARTS) == 1:
        return (_load_part(x, at, inside, start, D, PARTS, EXACT, 0),)
    else:
        return (
            _load_part(x, at, inside, start, D, PARTS, EXACT, 0),
            _load_part(x, at, inside, start, D, PARTS, EXACT, 1),
        )


@triton.jit
def _load_vector_part(x, start, D, PARTS: tl.constexpr, PART: tl.constexpr):
    column = columns(start, PARTS, PART)
    return tl.load(x + column.to(tl.int64), mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def load_vector(x, start, D, PARTS: tl.constexpr):
    """fp32 parts `[width]` of the vector that begins at x."""
    if len(PARTS) == 1:
        return (_load_vector_part(x, start, D, PARTS, 0),)
    else:
        return (
            _load_vector_part(x, start, D, PARTS, 0),
            _load_vector_part(x, start, D, PARTS, 1),
        )


@triton.jit
def store_part(
    out, at, inside, value, start, D, PARTS: tl.constexpr, EXACT: tl.constexpr, PART: tl.constexpr
):
    """A part `[ROWS, width]` of the rows at `at`."""
    column = columns(start, PARTS, PART)
    used = inside[:, None] if EXACT else inside[:, None] & (column < D)[None, :]
    tl.store(out + at[:, None] + column.to(tl.int64)[None, :], value, mask=used)


@triton.jit
def store_sums(out, row, sums, start, D, PARTS: tl.constexpr, PART: tl.constexpr):
    """The sum over its rows of a part, as a part of row `row` of `out [rows, D]`."""
    column = columns(start, PARTS, PART)
    at = out + row.to(tl.int64) * D + column.to(tl.int64)
    tl.store(at, tl.sum(sums, 0), mask=column < D)


@triton.jit
def zeros_like_rows(ROWS: tl.constexpr, PARTS: tl.constexpr):
    if len(PARTS) == 1:
        return (tl.full([ROWS, PARTS[0]], 0.0, tl.float32),)
    else:
        return (
            tl.full([ROWS, PARTS[0]], 0.0, tl.float32),
            tl.full([ROWS, PARTS[1]], 0.0, tl.float32),
        )


@triton.jit
def plus(a, b, PARTS: tl.constexpr):
    if len(PARTS) == 1:
        return (a[0] + b[0],)
    else:
        return a[0] + b[0], a[1] + b[1]


@triton.jit
def plus_products(a, b, c, PARTS: tl.constexpr):
    """a + b c."""
    if len(PARTS) == 1:
        return (tl.fma(b[0], c[0], a[0]),)
    else:
        return tl.fma(b[0], c[0], a[0]), tl.fma(b[1], c[1], a[1])
