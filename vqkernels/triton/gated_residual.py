"""Launches of `gated_residual` and its gradients.

    out = residual + gate x,    grad_x = gate g,    grad_gate = sum of g x over a vector's tokens

Floor, bytes an element, s the tokens' size: 3 s forward, 3 s backward (g and x read, grad_x
written; residual's gradient is g itself). On an H100 (3.0 TB/s of copies) bf16 [32, 256, 1152]
takes 18.9 us either way.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch
from vqkernels.triton.modulation_configs import RowConfig, chunk_rows, select_rows
from vqkernels.triton.modulation_rows import (
    block_of,
    load_rows,
    load_vector,
    parts_of,
    place,
    plus_products,
    spans_of,
    store_part,
    store_sums,
    tokens_of,
    vector_of,
    vector_offset,
    zeros_like_rows,
)
from vqkernels.triton.modulation_sums import add_all, sums_of


def gated_residual(
    residual: Tensor, x: Tensor, gate: Tensor, *, config: RowConfig | None = None
) -> Tensor:
    """`[B, N, D]` in residual's dtype."""
    out = residual.new_empty(residual.shape)
    if out.numel() == 0:
        return out
    tokens, added = tokens_of(residual), tokens_of(x)
    gates = vector_of(gate, x.shape[1])
    spans = spans_of(x, gates)
    dim = spans.sizes[2]
    config = config or select_rows("gate", dim)
    parts = (block_of(dim, config.block),) if config.block else parts_of(dim)
    d_blocks = triton.cdiv(dim, sum(parts))
    rows = min(config.rows, triton.next_power_of_2(spans.length))
    launch(
        _gated_residual,
        spans.count * triton.cdiv(spans.length, rows) * d_blocks,
        tokens.tensor,
        tokens.strides,
        added.tensor,
        added.strides,
        gates.tensor,
        gates.strides,
        out,
        spans.sizes,
        ROWS=rows,
        PARTS=parts,
        EXACT=dim == d_blocks * sum(parts),
        num_warps=config.num_warps,
    )
    return out


def gated_residual_backward(
    grad: Tensor, x: Tensor, gate: Tensor, *, config: RowConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and gate; residual's is `grad` itself."""
    grad_x, grad_gate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    if x.numel() == 0:
        return grad_x, grad_gate.zero_()
    tokens, arriving = tokens_of(x), tokens_of(grad)
    gates = vector_of(gate, x.shape[1])
    spans = spans_of(x, gates)
    dim = spans.sizes[2]
    config = config or select_rows("gate backward", dim)
    parts = (block_of(dim, config.block),) if config.block else parts_of(dim)
    d_blocks = triton.cdiv(dim, sum(parts))
    rows = min(config.rows, triton.next_power_of_2(spans.length))
    chunk = chunk_rows(config, spans.length, spans.count, rows, d_blocks)
    chunks = spans.count * triton.cdiv(spans.length, chunk)
    sums = sums_of(gates, grad_gate, chunks)
    launch(
        _gated_residual_backward,
        chunks * d_blocks,
        tokens.tensor,
        tokens.strides,
        arriving.tensor,
        arriving.strides,
        gates.tensor,
        gates.strides,
        grad_x,
        sums,
        spans.sizes,
        chunk,
        STAGES=config.stages,
        ROWS=rows,
        PARTS=parts,
        EXACT=dim == d_blocks * sum(parts),
        num_warps=config.num_warps,
    )
    add_all((sums, grad_gate))
    return grad_x, grad_gate


@triton.jit
def _gated_residual(
    residual,
    residual_strides,
    x,
    x_strides,
    gate,
    gate_strides,
    out,
    sizes,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: ROWS tokens of one span, a block of their columns."""
    D = sizes[2]
    WIDTH: tl.constexpr = PARTS[0] if len(PARTS) == 1 else PARTS[0] + PARTS[1]
    d_blocks = tl.cdiv(D, WIDTH)
    start = tl.program_id(0) % d_blocks * WIDTH
    tile = tl.program_id(0) // d_blocks
    tiles = tl.cdiv(sizes[1], ROWS)
    span = tile // tiles
    b, n, inside = place(span, tile % tiles * ROWS, sizes[1], sizes, ROWS)
    residual_at = b * residual_strides[0] + n * residual_strides[1]
    values = load_rows(residual, residual_at, inside, start, D, PARTS, EXACT)
    added = load_rows(x, b * x_strides[0] + n * x_strides[1], inside, start, D, PARTS, EXACT)
    gates = load_vector(gate + vector_offset(span, sizes, gate_strides), start, D, PARTS)
    at = (b * sizes[0] + n) * D
    for part in tl.static_range(len(PARTS)):
        value = tl.fma(gates[part][None, :], added[part], values[part])
        store_part(out, at, inside, value, start, D, PARTS, EXACT, part)


@triton.jit
def _gated_residual_backward(
    x,
    x_strides,
    grad,
    grad_strides,
    gate,
    gate_strides,
    grad_x,
    gate_sums,
    sizes,
    chunk,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: a chunk of one span's tokens, a block of their columns."""
    D = sizes[2]
    WIDTH: tl.constexpr = PARTS[0] if len(PARTS) == 1 else PARTS[0] + PARTS[1]
    d_blocks = tl.cdiv(D, WIDTH)
    start = tl.program_id(0) % d_blocks * WIDTH
    at_chunk = tl.program_id(0) // d_blocks
    per_span = tl.cdiv(sizes[1], chunk)
    span = at_chunk // per_span
    begin = at_chunk % per_span * chunk
    end = tl.minimum(begin + chunk, sizes[1])
    gates = load_vector(gate + vector_offset(span, sizes, gate_strides), start, D, PARTS)
    of_gates = zeros_like_rows(ROWS, PARTS)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        b, n, inside = place(span, first, end, sizes, ROWS)
        values = load_rows(x, b * x_strides[0] + n * x_strides[1], inside, start, D, PARTS, EXACT)
        grad_at = b * grad_strides[0] + n * grad_strides[1]
        grads = load_rows(grad, grad_at, inside, start, D, PARTS, EXACT)
        of_gates = plus_products(of_gates, grads, values, PARTS)
        at = (b * sizes[0] + n) * D
        for part in tl.static_range(len(PARTS)):
            back = grads[part] * gates[part][None, :]
            store_part(grad_x, at, inside, back, start, D, PARTS, EXACT, part)
    for part in tl.static_range(len(PARTS)):
        store_sums(gate_sums, at_chunk, of_gates[part], start, D, PARTS, part)
