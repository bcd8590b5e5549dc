"""How samples and their levels look to a kernel: B samples of E contiguous elements, a stride
between samples, and `levels` runs of equal length in each, of `level_size` elements."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.normals import normals_from, normals_of_elements


class Samples(NamedTuple):
    """A tensor whose samples are contiguous, or none, and the elements from one to the next."""

    tensor: Tensor | None
    stride: int


def samples_of(x: Tensor | None) -> Samples:
    """Copied only where a sample is not contiguous."""
    if x is None:
        return Samples(None, 0)
    if not x.is_contiguous() and not x[0].is_contiguous():
        x = x.contiguous()
    return Samples(x, x.stride(0))


class Levels(NamedTuple):
    """Levels a sample, and elements a level."""

    each: int
    size: int


def levels_of(x: Tensor, level: Tensor) -> Levels:
    return Levels(level.numel() // x.shape[0], x.numel() // level.numel())


def has_halves(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.element_size() == 2 for x in tensors)


@triton.jit
def blocks_of(E, BLOCK: tl.constexpr):
    """Rounded up; E + BLOCK may not fit into 32 bits."""
    return (E - 1) // BLOCK + 1


@triton.jit
def block_at(block, E, BLOCK: tl.constexpr):
    """(first element, lanes, which of them are inside) of one block of a sample."""
    start = tl.full([], BLOCK, tl.int64) * block
    lane = tl.arange(0, BLOCK)
    return start, lane, lane < E - start


@triton.jit
def block_of_program(E, BLOCK: tl.constexpr):
    """The sample of a program that has one block, and its `block_at`."""
    blocks = blocks_of(E, BLOCK)
    start, lane, inside = block_at(tl.program_id(0) % blocks, E, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), start, lane, inside


@triton.jit
def load_block(x, lane, inside):
    return tl.load(x + lane.to(tl.int64), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_block(x, lane, values, inside):
    tl.store(x + lane.to(tl.int64), values, mask=inside)


@triton.jit
def level_at(start, lane, level_size, BLOCK: tl.constexpr):
    """Of lanes behind element `start`, which level of the sample. 32-bit division: what a level
    has beyond a block cannot end in it."""
    first = start // level_size
    left = tl.minimum(level_size - start % level_size, BLOCK).to(tl.int32)
    size = tl.minimum(level_size, BLOCK).to(tl.int32)
    return first + tl.where(lane < left, 0, 1 + (lane - left) // size)


@triton.jit
def place_of_level(b, levels, start, lane, level_size, BLOCK: tl.constexpr, SEVERAL: tl.constexpr):
    """Where a dense tensor of levels has that of each lane; without SEVERAL a scalar."""
    if SEVERAL:
        return b * levels + level_at(start, lane, level_size, BLOCK)
    else:
        return b


@triton.jit
def load_level(values, place, inside, SEVERAL: tl.constexpr):
    if SEVERAL:
        return tl.load(values + place, mask=inside, other=0)
    else:
        return tl.load(values + place)


@triton.jit
def id_of(sample_ids, b):
    if sample_ids is None:
        return b
    else:
        return tl.load(sample_ids + b)


@triton.jit
def drawn_block(key, sample_ids, b, start, step, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Normals of a block that begins with a counter."""
    ids, stream = id_of(sample_ids, b), tl.load(key + 2)
    return normals_from(tl.load(key), start >> 2, ids, step, stream, [BLOCK], BLOCK, WIDE)


@triton.jit
def drawn_elements(key, sample_ids, b, start, step, BLOCK: tl.constexpr):
    """The same where every element has its own step."""
    element = start + tl.arange(0, BLOCK)
    return normals_of_elements(tl.load(key), element, id_of(sample_ids, b), step, tl.load(key + 2))


@triton.jit
def noise_block(
    noise,
    noise_stride,
    key,
    sample_ids,
    b,
    start,
    lane,
    inside,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Noise that is given, or drawn at the key's step."""
    if noise is None:
        return drawn_block(key, sample_ids, b, start, tl.load(key + 1), BLOCK, WIDE)
    else:
        return load_block(noise + b * noise_stride + start, lane, inside)
