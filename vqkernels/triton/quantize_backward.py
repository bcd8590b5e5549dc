"""Launches of `quantize`'s gradients.

    grad_x        = passed(grad_quantized) + grad_commitment 2 (x - code) / elements
    grad_codebook = grad_codebook_loss 2 / elements * sum over a code's rows of (code - x)

`elements` = D times the number of rows with a code. A row without one has no gradient. `passed` is
the identity (straight-through) or the rotation trick, with u and v the directions of x and its
code, w that of u + v:

    g -> |code| / |x| (g - 2 w (w.g) + 2 u (v.g))      Fifty et al., arXiv:2410.06424, section 4.2

Floor: x, the codes and the gradient read once, the result written once; the rotation reads them
twice more, out of L2, for its sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch
from vqkernels.triton.rows import filled, row_grid, row_offsets
from vqkernels.triton.segment_sum import segment_sum, segments

# Elements of a tile: 32 a thread of four warps; 8 where they are fp64.
_TILE, _WIDE_TILE = 4096, 1024
_BLOCK = 4096


def quantize_backward_x(
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    gradient: str,
) -> Tensor:
    """Gradient of x, in x's dtype and layout."""
    passed = None if gradient == "none" else grad_quantized
    if indices.numel() == 0 or (passed is None and grad_commitment is None):
        return torch.zeros_like(x)
    indices = indices.contiguous()
    grouped = codebook.dim() == 3
    books = codebook if grouped else codebook[None]
    grad_x = torch.empty_like(x)
    rows = row_grid([x, grad_x, x if passed is None else passed], grouped)
    found = indices.new_zeros((), dtype=torch.int32)
    if grad_commitment is not None:
        launch(
            _count_found,
            triton.cdiv(indices.numel(), _BLOCK),
            indices,
            found,
            indices.numel(),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    dim = x.shape[-1]
    block_d = min(128, triton.next_power_of_2(dim))
    shared = (
        rows.tensors[0],
        rows.strides[0],
        rows.tensors[1],
        rows.strides[1],
        rows.tensors[2],
        rows.strides[2],
        books,
        books.stride(),
        indices,
        rows.label_strides,
        found if grad_commitment is None else grad_commitment,
        found,
        rows.sizes,
        dim,
    )
    modes = {"COMMITTED": grad_commitment is not None, "BLOCK_D": block_d, "num_warps": 4}
    if passed is not None and gradient == "rotation":
        tile_rows = _WIDE_TILE // block_d
        programs = triton.cdiv(rows.per_group, tile_rows) * rows.groups
        launch(_rotated_grad_x, programs, *shared, ROWS=tile_rows, **modes)
    else:
        tile_rows = _TILE // block_d
        programs = triton.cdiv(rows.per_group, tile_rows) * rows.groups * triton.cdiv(dim, block_d)
        launch(_grad_x, programs, *shared, PASSED=passed is not None, ROWS=tile_rows, **modes)
    return filled(grad_x, rows, 1)


def quantize_backward_codebook(
    grad_codebook_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor
) -> Tensor:
    """Gradient of the codebook, in its dtype; summed in a fixed order."""
    grad = codebook.new_zeros(codebook.shape)
    if indices.numel() == 0:
        return grad
    grouped = codebook.dim() == 3
    rows = row_grid([x], grouped)
    found = segments(indices, rows, codebook.shape[-2])
    segment_sum(
        found,
        rows,
        grad if grouped else grad[None],
        minuend=codebook if grouped else codebook[None],
        factor=grad_codebook_loss,
    )
    return grad


@triton.jit
def _count_found(indices, found, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + at, mask=at < total, other=-1)
    tl.atomic_add(found, tl.sum((index >= 0).to(tl.int32), 0), sem="relaxed")


@triton.jit
def _grad_x(
    x,
    x_strides,
    grad_x,
    grad_x_strides,
    grad_quantized,
    grad_quantized_strides,
    books,
    book_strides,
    indices,
    label_strides,
    grad_commitment,
    found_rows,
    sizes,
    D,
    PASSED: tl.constexpr,
    COMMITTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d_blocks = tl.cdiv(D, BLOCK_D)
    blocks = tl.cdiv(sizes[0], ROWS)
    block = tl.program_id(0) // d_blocks
    g = block // blocks
    r = block % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    column64 = column.to(tl.int64)[None, :]
    inside = r < sizes[0]
    inside_d = (column < D)[None, :]
    index = tl.load(indices + row_offsets(g, r, sizes, label_strides), mask=inside, other=-1)
    found = index >= 0
    used = found[:, None] & inside_d

    # Rows without a code load zeros only, and so their gradient is zero.
    grad = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if COMMITTED:
        elements = tl.maximum(tl.load(found_rows), 1).to(tl.float32) * D
        factor = tl.div_rn(2.0 * tl.load(grad_commitment).to(tl.float32), elements)
        codes = books + g.to(tl.int64) * book_strides[0]
        codes += tl.where(found, index, 0) * book_strides[1]
        code = tl.load(codes[:, None] + column64 * book_strides[2], mask=used, other=0.0)
        rows = x + row_offsets(g, r, sizes, x_strides)
        row = tl.load(rows[:, None] + column64 * x_strides[4], mask=used, other=0.0)
        grad = factor * (row.to(tl.float32) - code.to(tl.float32))
    if PASSED:
        rows = grad_quantized + row_offsets(g, r, sizes, grad_quantized_strides)
        at = rows[:, None] + column64 * grad_quantized_strides[4]
        grad += tl.load(at, mask=used, other=0.0).to(tl.float32)
    out = grad_x + row_offsets(g, r, sizes, grad_x_strides)
    out = out[:, None] + column64 * grad_x_strides[4]
    tl.store(out, grad, mask=inside[:, None] & inside_d)


@triton.jit
def _rotated_grad_x(
    x,
    x_strides,
    grad_x,
    grad_x_strides,
    grad_quantized,
    grad_quantized_strides,
    books,
    book_strides,
    indices,
    label_strides,
    grad_commitment,
    found_rows,
    sizes,
    D,
    COMMITTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: ROWS rows of one book, all their columns. In fp64, since w and the sums along it
    are small differences where x and its code point in nearly opposite directions."""
    blocks = tl.cdiv(sizes[0], ROWS)
    g = tl.program_id(0) // blocks
    r = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = r < sizes[0]
    index = tl.load(indices + row_offsets(g, r, sizes, label_strides), mask=inside, other=-1)
    found = index >= 0
    # Rows without a code load zeros only, and so their gradient is zero.
    rows = x + row_offsets(g, r, sizes, x_strides)
    codes = books + g.to(tl.int64) * book_strides[0] + tl.where(found, index, 0) * book_strides[1]
    grads = grad_quantized + row_offsets(g, r, sizes, grad_quantized_strides)

    row_squares = tl.zeros([ROWS], tl.float64)
    code_squares = tl.zeros([ROWS], tl.float64)
    for start in range(0, D, BLOCK_D):
        row = _wide(rows, x_strides[4], start + d, found, D)
        code = _wide(codes, book_strides[2], start + d, found, D)
        row_squares += tl.sum(row * row, 1)
        code_squares += tl.sum(code * code, 1)
    to_u = 1.0 / tl.maximum(tl.sqrt(row_squares), 1e-6)
    code_length = tl.sqrt(code_squares)
    to_v = 1.0 / tl.maximum(code_length, 1e-6)

    squares = tl.zeros([ROWS], tl.float64)
    along_sum = tl.zeros([ROWS], tl.float64)
    along_code = tl.zeros([ROWS], tl.float64)
    for start in range(0, D, BLOCK_D):
        u = _wide(rows, x_strides[4], start + d, found, D) * to_u[:, None]
        v = _wide(codes, book_strides[2], start + d, found, D) * to_v[:, None]
        grad = _wide(grads, grad_quantized_strides[4], start + d, found, D)
        squares += tl.sum((u + v) * (u + v), 1)
        along_sum += tl.sum((u + v) * grad, 1)
        along_code += tl.sum(v * grad, 1)
    sum_length = tl.maximum(tl.sqrt(squares), 1e-6)
    along_sum = along_sum / sum_length / sum_length
    scale = code_length * to_u

    factor = 0.0
    if COMMITTED:
        elements = tl.maximum(tl.load(found_rows), 1).to(tl.float64) * D
        factor = 2.0 * tl.load(grad_commitment).to(tl.float64) / elements
    out = grad_x + row_offsets(g, r, sizes, grad_x_strides)
    for start in range(0, D, BLOCK_D):
        row = _wide(rows, x_strides[4], start + d, found, D)
        code = _wide(codes, book_strides[2], start + d, found, D)
        grad = _wide(grads, grad_quantized_strides[4], start + d, found, D)
        u = row * to_u[:, None]
        total = u + code * to_v[:, None]
        grad = grad - 2.0 * total * along_sum[:, None] + 2.0 * u * along_code[:, None]
        grad = scale[:, None] * grad + factor * (row - code)
        at = out[:, None] + (start + d).to(tl.int64)[None, :] * grad_x_strides[4]
        tl.store(at, grad.to(tl.float32), mask=inside[:, None] & (start + d < D)[None, :])


@triton.jit
def _wide(rows, stride, column, found, D):
    """fp64 values of these columns, zero where there are none."""
    at = rows[:, None] + column.to(tl.int64)[None, :] * stride
    return tl.load(at, mask=found[:, None] & (column < D)[None, :], other=0.0).to(tl.float64)
