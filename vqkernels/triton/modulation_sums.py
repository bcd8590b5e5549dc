"""Sums of chunks in order: gradients of vectors, weights and biases.

The backward kernels sum fixed chunks of rows, `[chunks, D]` in fp32. Here a vector's chunks, which
lie side by side, are added up in order; more than GROUP of them in groups first. No float atomics:
the same bits on every run. Floor: every chunk's sums read once, which for chunks of 64 bf16 rows is
a twenty-fourth of the bytes of x and its gradients, and stays in L2.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch
from vqkernels.triton.modulation_rows import Vector

# Chunks that one program adds up.
GROUP = 128
_ROWS, _BLOCK = 16, 64
PLAIN, AFFINE, SCALED = (tl.constexpr(value) for value in range(3))


def sums_of(vector: Vector, out: Tensor, chunks: int, alone: bool = True) -> Tensor:
    """Room for the sums of all chunks; `out` itself where each of its vectors has one chunk and
    the sum alone is the gradient."""
    if alone and vector.vectors == chunks:
        return out
    return out.new_empty((chunks, out.shape[-1]), dtype=torch.float32)


def add_up(
    sums: Tensor,
    out: Tensor,
    *,
    affine: tuple[Tensor | None, Tensor | None, Tensor] | None = None,
    scale: tuple[Vector, tuple[int, int, int]] | None = None,
) -> Tensor:
    """`out [V..., D]`, contiguous, from `sums [V * count, D]`; `out` itself if they are the same.

    Args:
        affine: (weight, bias, the sums beside): weight * sum + bias * the sum beside.
        scale: a vector and (chunks of a sample, chunks of a span, tokens of a span): each chunk
            times 1 + the vector that serves it.
    """
    if sums is out:
        return out
    dim = sums.shape[-1]
    vectors = out.numel() // dim
    count = sums.shape[0] // vectors
    groups = triton.cdiv(count, GROUP)
    weight, bias, beside = affine or (None, None, sums)
    # Groups first: what is linear in the sums can be applied to each of them.
    target = out if groups == 1 else sums.new_empty((vectors * groups, dim), dtype=torch.float32)
    launch(
        _add_up,
        vectors * groups * triton.cdiv(dim, _BLOCK),
        sums,
        beside,
        target,
        sums if weight is None else weight,
        sums if bias is None else bias,
        sums if scale is None else scale[0].tensor,
        (0, 0, 1) if scale is None else scale[0].strides,
        count,
        groups,
        dim,
        (1, 1, 1) if scale is None else scale[1],
        MODE=(SCALED if scale is not None else PLAIN if affine is None else AFFINE).value,
        WEIGHTED=weight is not None,
        BIASED=bias is not None,
        GROUP=GROUP,
        ROWS=_ROWS,
        BLOCK_D=_BLOCK,
        num_warps=4,
    )
    return out if target is out else add_up(target, out)


def add_all(*pairs: tuple[Tensor, Tensor]) -> None:
    """`add_up` of one to three (sums, out), of one width, in one launch where chunks are few."""
    few = []
    for sums, out in pairs:
        if sums is not out and sums.shape[0] * out.shape[-1] <= GROUP * out.numel():
            few.append((sums, out))
        else:
            add_up(sums, out)
    if not few:
        return
    dim = few[0][0].shape[-1]
    vectors = [out.numel() // dim for _, out in few]
    counts = [sums.shape[0] // of for (sums, _), of in zip(few, vectors, strict=True)]
    slots = [*few, *few[:1], *few[:1]][:3]
    launch(
        _add_all,
        sum(vectors) * triton.cdiv(dim, _BLOCK),
        *(tensor for slot in slots for tensor in slot),
        tuple([*vectors, 0, 0][:3]),
        tuple([*counts, 0, 0][:3]),
        dim,
        USED=len(few),
        ROWS=_ROWS,
        BLOCK_D=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _add_all(
    sums,
    out,
    more_sums,
    more_out,
    last_sums,
    last_out,
    vectors,
    counts,
    D,
    USED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one vector of one of the outputs, a block of its columns."""
    blocks = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    if row < vectors[0]:
        _add_chunks(sums, out, row, counts[0], column, D, ROWS, BLOCK_D)
    if USED > 1:
        row -= vectors[0]
        if (row >= 0) & (row < vectors[1]):
            _add_chunks(more_sums, more_out, row, counts[1], column, D, ROWS, BLOCK_D)
    if USED > 2:
        row -= vectors[1]
        if row >= 0:
            _add_chunks(last_sums, last_out, row, counts[2], column, D, ROWS, BLOCK_D)


@triton.jit
def _add_chunks(sums, out, row, count, column, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    inside_d = column < D
    column = column.to(tl.int64)
    first = row.to(tl.int64) * count
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, count, ROWS):
        chunk = start + tl.arange(0, ROWS)
        at = sums + (first + chunk)[:, None] * D + column[None, :]
        used = (chunk < count)[:, None] & inside_d[None, :]
        total += tl.load(at, mask=used, other=0.0)
    tl.store(out + row.to(tl.int64) * D + column, tl.sum(total, 0), mask=inside_d)


@triton.jit
def _add_up(
    sums,
    beside,
    out,
    weight,
    bias,
    scale,
    scale_strides,
    count,
    groups,
    D,
    chunks,
    MODE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a group of one vector's chunks, a block of its columns."""
    blocks = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_d = column < D
    vector = (row // groups).to(tl.int64)
    begin = row % groups * GROUP
    end = tl.minimum(begin + GROUP, count)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total_beside = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(begin, end, ROWS):
        chunk = start + tl.arange(0, ROWS)
        used = (chunk < end)[:, None] & inside_d[None, :]
        chunk = vector * count + chunk
        at = chunk[:, None] * D + column.to(tl.int64)[None, :]
        part = tl.load(sums + at, mask=used, other=0.0)
        if MODE == SCALED:
            sample = chunk // chunks[0]
            frame = chunk % chunks[0] // chunks[1] * chunks[2] // scale_strides[2]
            at_scale = sample * scale_strides[0] + frame * scale_strides[1]
            at_scale = at_scale[:, None] + column.to(tl.int64)[None, :]
            part *= 1.0 + tl.load(scale + at_scale, mask=used, other=0.0).to(tl.float32)
        total += part
        if MODE == AFFINE and BIASED:
            total_beside += tl.load(beside + at, mask=used, other=0.0)
    result = tl.sum(total, 0)
    if MODE == AFFINE:
        if WEIGHTED:
            at = weight + column.to(tl.int64)
            result *= tl.load(at, mask=inside_d, other=0.0).to(tl.float32)
        if BIASED:
            at = bias + column.to(tl.int64)
            added = tl.load(at, mask=inside_d, other=0.0).to(tl.float32)
            result += added * tl.sum(total_beside, 0)
    tl.store(out + row.to(tl.int64) * D + column.to(tl.int64), result, mask=inside_d)
