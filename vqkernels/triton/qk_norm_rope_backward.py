"""Launches of `qk_norm_rope`'s gradients; see `qk_norm_rope` for formulas and floors."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
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
    pair_columns,
    place_heads,
    store_pairs,
)
from vqkernels.triton.launch import launch
from vqkernels.triton.modulation_rows import row_of
from vqkernels.triton.modulation_sums import add_up


def qk_norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and the weights; no elements for a weight that is None."""
    of_q, of_k = q.new_empty(q.shape), k.new_empty(k.shape)
    weights = (q_weight, k_weight)
    of_weights = [q.new_empty(0) if w is None else w.new_empty(w.shape) for w in weights]
    if q.numel() + k.numel() == 0:
        return of_q, of_k, of_weights[0].zero_(), of_weights[1].zero_()
    q, k, grad_q, grad_k = (columns_together(t) for t in (q, k, grad_q, grad_k))
    plan = Plan((q, k, grad_q, grad_k), cos, sin, rows)
    sums = [
        q.new_empty((1 if w is None else plan.programs, q.shape[-1]), dtype=torch.float32)
        for w in weights
    ]
    launch(
        _qk_norm_rope_backward,
        plan.programs,
        q,
        plan.strides(q),
        grad_q,
        plan.strides(grad_q),
        of_q,
        row_of(q_weight, q),
        sums[0],
        k,
        plan.strides(k),
        grad_k,
        plan.strides(grad_k),
        of_k,
        row_of(k_weight, k),
        sums[1],
        *plan.tables,
        plan.sizes,
        plan.heads,
        eps,
        Q_WEIGHTED=q_weight is not None,
        K_WEIGHTED=k_weight is not None,
        **plan.modes(norm, interleaved),
    )
    for weight, sum_of, out in zip(weights, sums, of_weights, strict=True):
        if weight is not None:
            add_up(sum_of, out)
    return of_q, of_k, of_weights[0], of_weights[1]


@triton.jit
def _qk_norm_rope_backward(
    q,
    q_strides,
    grad_q,
    grad_q_strides,
    of_q,
    q_weight,
    q_sums,
    k,
    k_strides,
    grad_k,
    grad_k_strides,
    of_k,
    k_weight,
    k_sums,
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
    total = tl.zeros([ROWS, HALF], tl.float32)
    total_more = tl.zeros([ROWS, HALF], tl.float32)
    for head in range(first, tl.minimum(last, sizes[0])):
        head64 = tl.cast(head, tl.int64)
        of_a, of_b = _turn_back(
            q + (b * q_strides[0] + head64 * q_strides[1]) * UNIT,
            n * q_strides[2] * UNIT,
            grad_q + (b * grad_q_strides[0] + head64 * grad_q_strides[1]) * UNIT,
            n * grad_q_strides[2] * UNIT,
            of_q + (b * sizes[0] + head) * sizes[2] * D,
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
        total += of_a
        total_more += of_b
    if Q_WEIGHTED:
        _store_sums(q_sums, total, total_more, D, INTERLEAVED, HALF)

    w, w_more = load_weights(k_weight, D, K_WEIGHTED, INTERLEAVED, HALF)
    total = tl.zeros([ROWS, HALF], tl.float32)
    total_more = tl.zeros([ROWS, HALF], tl.float32)
    for head in range(tl.maximum(first - sizes[0], 0), last - sizes[0]):
        head64 = tl.cast(head, tl.int64)
        of_a, of_b = _turn_back(
            k + (b * k_strides[0] + head64 * k_strides[1]) * UNIT,
            n * k_strides[2] * UNIT,
            grad_k + (b * grad_k_strides[0] + head64 * grad_k_strides[1]) * UNIT,
            n * grad_k_strides[2] * UNIT,
            of_k + (b * sizes[1] + head) * sizes[2] * D,
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
        total += of_a
        total_more += of_b
    if K_WEIGHTED:
        _store_sums(k_sums, total, total_more, D, INTERLEAVED, HALF)


@triton.jit
def _turn_back(
    source,
    source_at,
    grad,
    grad_at,
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
    """Gradients of some rows of one head; returns what each adds to the weights'."""
    a, b = load_pairs(source, source_at, inside, D, INTERLEAVED, HALF)
    g, g_more = load_pairs(grad, grad_at, inside, D, INTERLEAVED, HALF)
    a, b, inverse = normed_pairs(a, b, D, eps, CENTERED, NORMED, INTERLEAVED, HALF)
    if ROTATED:
        turned = g * c + g_more * s
        g_more = g_more * c - g * s
        g = turned
    of_a = g * a
    of_b = g_more * b
    g *= w[None, :]
    g_more *= w_more[None, :]
    if NORMED:
        share = 1.0 / D
        slope = (tl.sum(g * a, 1) + tl.sum(g_more * b, 1)) * share
        if CENTERED:
            constant = (tl.sum(g, 1) + tl.sum(g_more, 1)) * share
            g -= constant[:, None]
            g_more -= constant[:, None]
        g = (g - a * slope[:, None]) * inverse
        g_more = (g_more - b * slope[:, None]) * inverse
    store_pairs(target, target_at, inside, g, g_more, D, INTERLEAVED, HALF)
    return of_a, of_b


@triton.jit
def _store_sums(
    sums, total, total_more, D: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr
):
    """This program's sums, as a row of `[programs, D]`."""
    first, second, used, used_more = pair_columns(D, INTERLEAVED, HALF)
    out = sums + tl.program_id(0).to(tl.int64) * D
    tl.store(out + first.to(tl.int64), tl.sum(total, 0), mask=used)
    tl.store(out + second.to(tl.int64), tl.sum(total_more, 0), mask=used_more)
