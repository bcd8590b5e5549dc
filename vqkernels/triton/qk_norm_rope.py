"""Launch of `qk_norm_rope`.

With n the normalized row, y = n weight and h the arriving gradient turned back:

    out         = (a cos - b sin, b cos + a sin) for each pair (a, b) of y
    grad_x      = (h weight - mean(h weight) - n mean(h weight n)) / deviation
    grad_weight = sum of h n, a chunk for each program, the chunks in order (`modulation_sums`)

Nothing is kept from the forward pass: a row's statistics are made again from the row, which is
read anyway. A program takes some tokens of one sample and runs over heads, so that tables are read
once for many of them. Floor, bytes an element of q and k, s their size: 2 s forward, 3 s backward.
On an H100 (3.0 TB/s of copies) bf16 q and k of [8, 24, 4096, 64] take 134 us forward.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.head_pairs import (
    Plan,
    columns_together,
    load_angles,
    load_pairs,
    load_weights,
    normed_pairs,
    place_heads,
    store_pairs,
)
from vqkernels.triton.launch import launch
from vqkernels.triton.modulation_rows import row_of


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    interleaved: bool,
    *,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k, each in its shape and dtype; `rows` tokens a tile instead of what fits."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    q, k = columns_together(q), columns_together(k)
    plan = Plan((q, k), cos, sin, rows)
    launch(
        _qk_norm_rope,
        plan.programs,
        q,
        plan.strides(q),
        q_out,
        row_of(q_weight, q),
        k,
        plan.strides(k),
        k_out,
        row_of(k_weight, k),
        *plan.tables,
        plan.sizes,
        plan.heads,
        eps,
        Q_WEIGHTED=q_weight is not None,
        K_WEIGHTED=k_weight is not None,
        **plan.modes(norm, interleaved),
    )
    return q_out, k_out


@triton.jit
def _qk_norm_rope(
    q,
    q_strides,
    q_out,
    q_weight,
    k,
    k_strides,
    k_out,
    k_weight,
    cos,
    cos_strides,
    sin,
    sin_strides,
    sizes,
    heads,
    eps,
    CENTERED: tl.constexpr,
    NORMED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_WEIGHTED: tl.constexpr,
    K_WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One program: ROWS tokens of one sample, `heads` of the heads of q and k together."""
    b, n, first, last = place_heads(sizes, heads, ROWS)
    inside = n < sizes[2]
    c, s = load_angles(cos, cos_strides, sin, sin_strides, b, n, inside, D, ROTATED, ROWS, HALF)
    w, w_more = load_weights(q_weight, D, Q_WEIGHTED, INTERLEAVED, HALF)
    for head in range(first, tl.minimum(last, sizes[0])):
        source = q + (b * q_strides[0] + tl.cast(head, tl.int64) * q_strides[1]) * UNIT
        target = q_out + (b * sizes[0] + head) * sizes[2] * D
        _turn(
            source,
            n * q_strides[2] * UNIT,
            target,
            n * D,
            inside,
            w,
            w_more,
            c,
            s,
            D,
            eps,
            CENTERED,
            NORMED,
            ROTATED,
            INTERLEAVED,
            HALF,
        )
    w, w_more = load_weights(k_weight, D, K_WEIGHTED, INTERLEAVED, HALF)
    for head in range(tl.maximum(first - sizes[0], 0), last - sizes[0]):
        source = k + (b * k_strides[0] + tl.cast(head, tl.int64) * k_strides[1]) * UNIT
        target = k_out + (b * sizes[1] + head) * sizes[2] * D
        _turn(
            source,
            n * k_strides[2] * UNIT,
            target,
            n * D,
            inside,
            w,
            w_more,
            c,
            s,
            D,
            eps,
            CENTERED,
            NORMED,
            ROTATED,
            INTERLEAVED,
            HALF,
        )


@triton.jit
def _turn(
    source,
    source_at,
    target,
    target_at,
    inside,
    w,
    w_more,
    c,
    s,
    D: tl.constexpr,
    eps,
    CENTERED: tl.constexpr,
    NORMED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
):
    """Some rows of one head."""
    a, b = load_pairs(source, source_at, inside, D, INTERLEAVED, HALF)
    a, b, _ = normed_pairs(a, b, D, eps, CENTERED, NORMED, INTERLEAVED, HALF)
    a *= w[None, :]
    b *= w_more[None, :]
    if ROTATED:
        turned = a * c - b * s
        b = b * c + a * s
        a = turned
    store_pairs(target, target_at, inside, a, b, D, INTERLEAVED, HALF)
