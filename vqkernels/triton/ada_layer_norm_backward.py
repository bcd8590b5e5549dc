"""Launches of `ada_layer_norm`'s gradients, with a gated sum before it or without one.

With n the normalized row, g the arriving gradient and h = g (1 + scale) weight:

    grad_x      = (h - mean(h) - n mean(h n)) / deviation     + the gradient that passes by the norm
    grad_shift  = sum g              over the tokens of a vector
    grad_scale  = weight sum g n + bias sum g
    grad_weight = sum (1 + scale) sum g n                     of the spans of all vectors
    grad_bias   = sum (1 + scale) sum g
    gated:  grad_branch = gate grad_x, grad_gate = sum grad_x branch, residual's is grad_x

so two sums a column (three where gated) of fixed chunks of rows serve all of them, and
`modulation_sums` adds the chunks up in order.

Floor, bytes an element, s the tokens' size: x and g read, grad_x written: 3 s; gated 6 s (the new
residual, two gradients and the branch read, two gradients written). On an H100 (3.0 TB/s of copies)
bf16 [32, 256, 1152] takes 18.9 us, gated 37.7. One pass; rows of more columns than registers hold
are read once more for their sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
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
    plus,
    plus_products,
    row_of,
    spans_of,
    store_part,
    store_sums,
    tokens_of,
    vector_of,
    vector_offset,
    zeros_like_rows,
)
from vqkernels.triton.modulation_sums import add_all, add_up, sums_of

Gated = tuple[Tensor | None, Tensor, Tensor]


def ada_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    norm: str,
    *,
    config: RowConfig | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, shift, scale, weight and bias; no elements for what is None."""
    return normalize_backward(
        grad, x, shift, scale, weight, bias, statistics, norm, gated=None, config=config
    )


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    norm: str,
    *,
    gated: Gated | None,
    config: RowConfig | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, shift, scale, weight and bias; with `gated` (the gradient that passes by the
    norm or None, branch, gate) also those of branch and gate."""
    like = (x, shift, scale, weight, bias, *(gated[1:] if gated else ()))
    grads = tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in like)
    if x.numel() == 0:
        return tuple(of.zero_() for of in grads)
    passed, branch, gate = gated or (None, x, scale)
    grad_x, grad_shift, grad_scale, grad_weight, grad_bias = grads[:5]
    grad_branch, grad_gate = grads[5:] or (grad_x, grad_scale)
    _, tokens, dim = x.shape
    shifts, scales, gates = (vector_of(of, tokens) for of in (shift, scale, gate))
    spans = spans_of(x, shifts, scales, gates)
    config = config or select_rows("norm backward", dim)
    wide = config.block > 0
    parts = (block_of(dim, config.block),) if wide else parts_of(dim)
    rows = min(config.rows, triton.next_power_of_2(spans.length))
    d_blocks = triton.cdiv(dim, parts[0]) if wide else 1
    chunk = chunk_rows(config, spans.length, spans.count, rows, d_blocks)
    per_span = triton.cdiv(spans.length, chunk)
    chunks = spans.count * per_span

    plain = weight is None and bias is None
    grad_sums = sums_of(shifts, grad_shift, chunks, alone=bias is None)
    normed_sums = sums_of(scales, grad_scale, chunks, alone=plain)
    gate_sums = sums_of(gates, grad_gate, chunks) if gated else normed_sums

    x_rows, grad_rows, branch_rows = tokens_of(x), tokens_of(grad), tokens_of(branch)
    passed_rows = grad_rows if passed is None else tokens_of(passed)
    modes = {"CENTERED": norm == "layer", "WEIGHTED": weight is not None}
    along = statistics
    if wide:
        along = torch.empty_like(statistics)
        launch(
            _sums_along_rows,
            x.numel() // dim,
            x_rows.tensor,
            x_rows.strides,
            grad_rows.tensor,
            grad_rows.strides,
            scales.tensor,
            scales.strides,
            row_of(weight, x),
            statistics,
            along,
            (tokens, 1, dim),
            BLOCK_D=config.block,
            num_warps=config.num_warps,
            **modes,
        )
    launch(
        _normalize_backward,
        chunks * d_blocks,
        x_rows.tensor,
        x_rows.strides,
        grad_rows.tensor,
        grad_rows.strides,
        passed_rows.tensor,
        passed_rows.strides,
        branch_rows.tensor,
        branch_rows.strides,
        gates.tensor,
        gates.strides,
        scales.tensor,
        scales.strides,
        row_of(weight, x),
        statistics,
        along,
        grad_x,
        grad_branch,
        grad_sums,
        normed_sums,
        gate_sums,
        spans.sizes,
        chunk,
        GATED=gated is not None,
        PASSED=passed is not None,
        WIDE=wide,
        STAGES=config.stages,
        ROWS=rows,
        PARTS=parts,
        EXACT=dim % parts[0] == 0 if wide else dim == sum(parts),
        num_warps=config.num_warps,
        **modes,
    )
    pairs = [(grad_sums, grad_shift)]
    pairs += [(normed_sums, grad_scale)] if plain else []
    pairs += [(gate_sums, grad_gate)] if gated else []
    add_all(*pairs)
    if not plain:
        add_up(normed_sums, grad_scale, affine=(weight, bias, grad_sums))
    factor = (scales, (tokens // spans.length * per_span, per_span, spans.length))
    if weight is not None:
        add_up(normed_sums, grad_weight, scale=factor)
    if bias is not None:
        add_up(grad_sums, grad_bias, scale=factor)
    return grads


@triton.jit
def _normalize_backward(
    x,
    x_strides,
    grad,
    grad_strides,
    passed,
    passed_strides,
    branch,
    branch_strides,
    gate,
    gate_strides,
    scale,
    scale_strides,
    weight,
    statistics,
    along,
    grad_x,
    grad_branch,
    grad_sums,
    normed_sums,
    gate_sums,
    sizes,
    chunk,
    GATED: tl.constexpr,
    PASSED: tl.constexpr,
    CENTERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: a chunk of one span's tokens, all their columns; under WIDE a block of them."""
    D = sizes[2]
    per_span = tl.cdiv(sizes[1], chunk)
    at_chunk = tl.program_id(0)
    start = 0
    if WIDE:
        d_blocks = tl.cdiv(D, PARTS[0])
        start = at_chunk % d_blocks * PARTS[0]
        at_chunk = at_chunk // d_blocks
    span = at_chunk // per_span
    begin = at_chunk % per_span * chunk
    end = tl.minimum(begin + chunk, sizes[1])
    share = 1.0 / D
    factors = load_vector(scale + vector_offset(span, sizes, scale_strides), start, D, PARTS)
    factors = _factors(factors, weight, start, D, WEIGHTED, PARTS)
    if GATED:
        gates = load_vector(gate + vector_offset(span, sizes, gate_strides), start, D, PARTS)
        of_gates = zeros_like_rows(ROWS, PARTS)
    of_grads = zeros_like_rows(ROWS, PARTS)
    of_normed = zeros_like_rows(ROWS, PARTS)

    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        b, n, inside = place(span, first, end, sizes, ROWS)
        row = b * sizes[0] + n
        at = row * D
        x_at = b * x_strides[0] + n * x_strides[1]
        normed = load_rows(x, x_at, inside, start, D, PARTS, EXACT)
        grad_at = b * grad_strides[0] + n * grad_strides[1]
        grads = load_rows(grad, grad_at, inside, start, D, PARTS, EXACT)
        if PASSED:
            passed_at = b * passed_strides[0] + n * passed_strides[1]
            passing = load_rows(passed, passed_at, inside, start, D, PARTS, EXACT)
        if GATED:
            branch_at = b * branch_strides[0] + n * branch_strides[1]
            added = load_rows(branch, branch_at, inside, start, D, PARTS, EXACT)
        mean = tl.load(statistics + 2 * row, mask=inside, other=0.0)
        inverse = tl.load(statistics + 2 * row + 1, mask=inside, other=0.0)
        normed = _normed(normed, mean, inverse, CENTERED, PARTS)
        if WIDE:
            through_mean = tl.load(along + 2 * row, mask=inside, other=0.0)
            through_normed = tl.load(along + 2 * row + 1, mask=inside, other=0.0)
        else:
            through_mean, through_normed = _along(grads, normed, factors, CENTERED, PARTS)
        through_mean *= share
        through_normed *= share

        of_grads = plus(of_grads, grads, PARTS)
        of_normed = plus_products(of_normed, grads, normed, PARTS)
        grads = _through_norm(
            grads, normed, factors, through_mean, through_normed, inverse, CENTERED, PARTS
        )
        if PASSED:
            grads = plus(grads, passing, PARTS)
        for part in tl.static_range(len(PARTS)):
            store_part(grad_x, at, inside, grads[part], start, D, PARTS, EXACT, part)
        if GATED:
            of_gates = plus_products(of_gates, grads, added, PARTS)
            for part in tl.static_range(len(PARTS)):
                back = grads[part] * gates[part][None, :]
                store_part(grad_branch, at, inside, back, start, D, PARTS, EXACT, part)

    for part in tl.static_range(len(PARTS)):
        store_sums(grad_sums, at_chunk, of_grads[part], start, D, PARTS, part)
        store_sums(normed_sums, at_chunk, of_normed[part], start, D, PARTS, part)
        if GATED:
            store_sums(gate_sums, at_chunk, of_gates[part], start, D, PARTS, part)


@triton.jit
def _factors(scales, weight, start, D, WEIGHTED: tl.constexpr, PARTS: tl.constexpr):
    """(1 + scale) weight."""
    if WEIGHTED:
        weights = load_vector(weight, start, D, PARTS)
        if len(PARTS) == 1:
            return ((1.0 + scales[0]) * weights[0],)
        else:
            return (1.0 + scales[0]) * weights[0], (1.0 + scales[1]) * weights[1]
    else:
        if len(PARTS) == 1:
            return (1.0 + scales[0],)
        else:
            return 1.0 + scales[0], 1.0 + scales[1]


@triton.jit
def _normed_part(values, mean, inverse, CENTERED: tl.constexpr):
    return (values - mean[:, None] if CENTERED else values) * inverse[:, None]


@triton.jit
def _normed(values, mean, inverse, CENTERED: tl.constexpr, PARTS: tl.constexpr):
    if len(PARTS) == 1:
        return (_normed_part(values[0], mean, inverse, CENTERED),)
    else:
        return (
            _normed_part(values[0], mean, inverse, CENTERED),
            _normed_part(values[1], mean, inverse, CENTERED),
        )


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _along_part(grads, normed, factors, CENTERED: tl.constexpr):
    h = grads * factors[None, :]
    if CENTERED:
        return tl.reduce((h, h * normed), 1, _add_both)
    else:
        along = tl.sum(h * normed, 1)
        return along, along


@triton.jit
def _along(grads, normed, factors, CENTERED: tl.constexpr, PARTS: tl.constexpr):
    """Sums along rows of h (anything unless CENTERED) and of h n."""
    constant, slope = _along_part(grads[0], normed[0], factors[0], CENTERED)
    if len(PARTS) == 2:
        more, more_slope = _along_part(grads[1], normed[1], factors[1], CENTERED)
        constant += more
        slope += more_slope
    return constant, slope


@triton.jit
def _grad_part(grads, normed, factors, constant, slope, inverse, CENTERED: tl.constexpr):
    h = grads * factors[None, :]
    if CENTERED:
        h -= constant[:, None]
    return tl.fma(normed, -slope[:, None], h) * inverse[:, None]


@triton.jit
def _through_norm(
    grads,
    normed,
    factors,
    constant,
    slope,
    inverse,
    CENTERED: tl.constexpr,
    PARTS: tl.constexpr,
):
    if len(PARTS) == 1:
        return (_grad_part(grads[0], normed[0], factors[0], constant, slope, inverse, CENTERED),)
    else:
        return (
            _grad_part(grads[0], normed[0], factors[0], constant, slope, inverse, CENTERED),
            _grad_part(grads[1], normed[1], factors[1], constant, slope, inverse, CENTERED),
        )


@triton.jit
def _sums_along_rows(
    x,
    x_strides,
    grad,
    grad_strides,
    scale,
    scale_strides,
    weight,
    statistics,
    along,
    sizes,
    CENTERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: the sums of h and h n along one row. A span is one token here."""
    D = sizes[2]
    row = tl.program_id(0).to(tl.int64)
    b = row // sizes[0]
    n = row % sizes[0]
    x += b * x_strides[0] + n * x_strides[1]
    grad += b * grad_strides[0] + n * grad_strides[1]
    scale += vector_offset(tl.program_id(0), sizes, scale_strides)
    mean = tl.load(statistics + 2 * row)
    inverse = tl.load(statistics + 2 * row + 1)
    constant = tl.zeros([BLOCK_D], tl.float32)
    slope = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        used = column < D
        column = column.to(tl.int64)
        normed = tl.load(x + column, mask=used, other=0.0).to(tl.float32)
        if CENTERED:
            normed -= mean
        normed *= inverse
        h = tl.load(grad + column, mask=used, other=0.0).to(tl.float32)
        h *= 1.0 + tl.load(scale + column, mask=used, other=0.0).to(tl.float32)
        if WEIGHTED:
            h *= tl.load(weight + column, mask=used, other=0.0).to(tl.float32)
        constant += h
        slope += h * normed
    tl.store(along + 2 * row, tl.sum(constant, 0))
    tl.store(along + 2 * row + 1, tl.sum(slope, 0))
