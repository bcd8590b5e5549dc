"""Launches of `bias_gelu` and its gradients.

    tanh    gelu(u) = u / (1 + exp(-p)),  p = 2 sqrt(2 / pi) (u + 0.044715 u^3)
    none    gelu(u) = max(u, 0) - z q(z) exp(-z^2 / 2),  z = |u|,
            q(z) exp(-z^2 / 2) = erfc(z / sqrt(2)) / 2

Floor, bytes an element, s the size of x: 2 s forward, 3 s backward (x and the gradient read, x's
gradient written). On an H100 (3.0 TB/s of copies) bf16 [32, 256, 4608] takes 50 us forward and
75.5 backward. Either form takes about 20 instructions an element; 38 fit into the floor of bf16.
The bias' gradient is summed in fixed chunks of rows, and these in order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch
from vqkernels.triton.modulation_configs import RowConfig, chunk_rows, select_rows
from vqkernels.triton.modulation_rows import block_of, row_of
from vqkernels.triton.modulation_sums import add_up

_LOG2_E = tl.constexpr(1.44269504088896341)
_SLOPE = tl.constexpr(1.59576912160573)
_CUBE = tl.constexpr(0.044715)
_DENSITY = tl.constexpr(0.398942280401433)
# Beyond these GELU is u itself, or less than 1e-27; within them all powers are finite.
_TANH_END, _ERF_END = tl.constexpr(9.0), tl.constexpr(13.0)


def bias_gelu(
    x: Tensor, bias: Tensor | None, approximate: str, *, config: RowConfig | None = None
) -> Tensor:
    """`[..., D]` in x's dtype."""
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    rows = _rows(x)
    count, dim = rows.shape
    config = config or select_rows("gelu", dim)
    block = block_of(dim, config.block)
    launch(
        _bias_gelu,
        triton.cdiv(count, config.rows) * triton.cdiv(dim, block),
        rows,
        rows.stride(0),
        row_of(bias, x),
        out,
        count,
        dim,
        TANH=approximate == "tanh",
        BIASED=bias is not None,
        ROWS=config.rows,
        BLOCK_D=block,
        EXACT=dim % block == 0,
        num_warps=config.num_warps,
    )
    return out


def bias_gelu_backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    approximate: str,
    *,
    config: RowConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and bias; no elements for a bias that is None."""
    grad_x = x.new_empty(x.shape)
    grad_bias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    if x.numel() == 0:
        return grad_x, grad_bias.zero_()
    rows, grads = _rows(x), _rows(grad)
    count, dim = rows.shape
    config = config or select_rows("gelu backward", dim)
    block = block_of(dim, config.block)
    d_blocks = triton.cdiv(dim, block)
    chunk = chunk_rows(config, count, 1, config.rows, d_blocks)
    chunks = triton.cdiv(count, chunk)
    sums = x.new_empty((chunks if bias is not None else 1, dim), dtype=torch.float32)
    launch(
        _bias_gelu_backward,
        chunks * d_blocks,
        rows,
        rows.stride(0),
        grads,
        grads.stride(0),
        row_of(bias, x),
        grad_x,
        sums,
        count,
        dim,
        chunk,
        TANH=approximate == "tanh",
        BIASED=bias is not None,
        STAGES=config.stages,
        ROWS=config.rows,
        BLOCK_D=block,
        EXACT=dim % block == 0,
        num_warps=config.num_warps,
    )
    return grad_x, grad_bias if bias is None else add_up(sums, grad_bias)


def _rows(x: Tensor) -> Tensor:
    """`[R, D]` with adjacent columns, copied only where strides leave no choice."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def _bias_gelu(
    x,
    x_stride,
    bias,
    out,
    rows,
    D,
    TANH: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: ROWS rows, a block of their columns."""
    d_blocks = tl.cdiv(D, BLOCK_D)
    row = (tl.program_id(0) // d_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    used = _used(row < rows, column < D, EXACT)
    column64 = column.to(tl.int64)[None, :]
    u = tl.load(x + row[:, None] * x_stride + column64, mask=used, other=0.0).to(tl.float32)
    if BIASED:
        at = bias + column.to(tl.int64)
        u += tl.load(at, mask=column < D, other=0.0).to(tl.float32)[None, :]
    value = _tanh_value(u) if TANH else _erf_value(u)
    tl.store(out + row[:, None] * D + column64, value, mask=used)


@triton.jit
def _bias_gelu_backward(
    x,
    x_stride,
    grad,
    grad_stride,
    bias,
    grad_x,
    sums,
    rows,
    D,
    chunk,
    TANH: tl.constexpr,
    BIASED: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: a chunk of rows, a block of their columns."""
    d_blocks = tl.cdiv(D, BLOCK_D)
    at_chunk = (tl.program_id(0) // d_blocks).to(tl.int64)
    column = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    column64 = column.to(tl.int64)[None, :]
    inside_d = column < D
    if BIASED:
        biases = bias + column.to(tl.int64)
        added = tl.load(biases, mask=inside_d, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for step in tl.range(0, chunk, ROWS, num_stages=STAGES):
        in_chunk = step + tl.arange(0, ROWS)
        row = at_chunk * chunk + in_chunk
        used = _used((row < rows) & (in_chunk < chunk), inside_d, EXACT)
        u = tl.load(x + row[:, None] * x_stride + column64, mask=used, other=0.0).to(tl.float32)
        if BIASED:
            u += added
        at = grad + row[:, None] * grad_stride + column64
        back = tl.load(at, mask=used, other=0.0).to(tl.float32)
        back *= _tanh_slope(u) if TANH else _erf_slope(u)
        tl.store(grad_x + row[:, None] * D + column64, back, mask=used)
        if BIASED:
            total += back
    if BIASED:
        at = sums + at_chunk * D + column.to(tl.int64)
        tl.store(at, tl.sum(total, 0), mask=inside_d)


@triton.jit
def _used(inside, inside_d, EXACT: tl.constexpr):
    return inside[:, None] if EXACT else inside[:, None] & inside_d[None, :]


@triton.jit
def _below(u, END: tl.constexpr):
    return tl.where(u > END, END, u)


@triton.jit
def _above(u, END: tl.constexpr):
    """A comparison is false for a NaN, which so stays one."""
    return tl.where(u < -END, -END, u)


@triton.jit
def _tanh_power(v, square):
    """exp(-p)."""
    inner = tl.fma(square, -_SLOPE * _CUBE * _LOG2_E, -_SLOPE * _LOG2_E)
    return tl.exp2(v * inner)


@triton.jit
def _tanh_value(u):
    above = _above(u, _TANH_END)
    v = _below(above, _TANH_END)
    return above / (1.0 + _tanh_power(v, v * v))


@triton.jit
def _tanh_slope(u):
    v = _below(_above(u, _TANH_END), _TANH_END)
    square = v * v
    power = _tanh_power(v, square)
    s = 1.0 / (1.0 + power)
    inner = tl.fma(square, 3.0 * _SLOPE * _CUBE, _SLOPE)
    # power s is 1 - s, without the cancellation.
    return tl.fma(v * inner, power * s * s, s)


@triton.jit
def _erf_tail(z, bell):
    """erfc(z / sqrt(2)) / 2 for z from 0 to 14, within 1.1e-9: the bell exp(-z^2 / 2) times a
    minimax polynomial in 1 / (1 + 0.32 z)."""
    t = 1.0 / tl.fma(z, 0.3199999928474426, 1.0)
    y = tl.fma(t, 0.04757866635918617, -0.250776082277298)
    y = tl.fma(y, t, 0.4316259026527405)
    y = tl.fma(y, t, -0.19624961912631989)
    y = tl.fma(y, t, 0.24138277769088745)
    y = tl.fma(y, t, 0.09430350363254547)
    y = tl.fma(y, t, 0.1324143260717392)
    y = tl.fma(y, t, -0.0002794674946926534)
    return bell * y


@triton.jit
def _bell(z):
    return tl.exp2(z * z * (-0.5 * _LOG2_E))


@triton.jit
def _erf_value(u):
    z = tl.abs(_below(_above(u, _ERF_END), _ERF_END))
    return tl.where(u < 0.0, 0.0, u) - z * _erf_tail(z, _bell(z))


@triton.jit
def _erf_slope(u):
    v = _below(_above(u, _ERF_END), _ERF_END)
    z = tl.abs(v)
    bell = _bell(z)
    tail = _erf_tail(z, bell)
    phi = tl.where(u < 0.0, tail, 1.0 - tail)
    return tl.fma(v * _DENSITY, bell, phi)
