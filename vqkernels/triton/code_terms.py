"""What every search needs of the book, computed once a call: K * D work against N * K * D.

    l2      score = |c|^2 / 2 - x.c         dot     score = 0 - x.c
    cosine  score = 0 - (x.c) * (1 / |c|)   (a zero code: 0)

The smallest score wins. `bias` holds the first term and +inf for a code with a NaN or an infinity
and for the padding behind K, so that such a code never wins. A finite code always can: |c|^2 beyond
fp32's range (|c| over 1.8e19) counts as the largest fp32 number. Forms of the codes themselves:

    NATIVE  none: the search reads the book. `scale` holds 1 / |c| for cosine.
    PLANES  three bf16 terms whose sum is the fp32 code, [3, G, K, D]: tensor cores, fp32 exact.
    COLUMNS -code in fp32, [G, D, padded K]: a search with registers only reads it in order.

The last two hold normalized codes for cosine, and zeros for a code that never wins.
Floor: one read of the book, one write of the form; a few microseconds up to K * D = 2^22.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch

NATIVE, PLANES, COLUMNS = 0, 1, 2
METRIC_IDS = {"l2": 0, "dot": 1, "cosine": 2}

# A search tile reads whole tiles of `bias`, and so this is the largest tile of codes.
PADDING = 256

# The number of codes times columns a program holds at once: 16 fp32 registers a thread.
_TILE = 2048


@dataclass(frozen=True)
class CodeTerms:
    """bias and scale `[G, padded K]` fp32; form as the module docstring says."""

    bias: Tensor
    scale: Tensor
    form: Tensor


def code_terms(codebook: Tensor, metric: str, form: int) -> CodeTerms:
    """Terms of a book `[G, K, D]` for a search with this metric and form."""
    groups, size, dim = codebook.shape
    padded = triton.cdiv(size, PADDING) * PADDING
    bias = codebook.new_empty((groups, padded), dtype=torch.float32)
    scale, result = bias, codebook
    if form == PLANES:
        result = codebook.new_empty((3, groups, size, dim), dtype=torch.bfloat16)
    elif form == COLUMNS:
        result = codebook.new_empty((groups, dim, padded), dtype=torch.float32)
    elif metric == "cosine":
        scale = torch.empty_like(bias)
    block_d = min(128, triton.next_power_of_2(dim))
    block_k = _TILE // block_d
    launch(
        _code_terms,
        triton.cdiv(padded, block_k) * groups,
        codebook,
        *codebook.stride(),
        bias,
        scale,
        result,
        size,
        padded,
        dim,
        groups * size * dim,
        METRIC=METRIC_IDS[metric],
        FORM=form,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return CodeTerms(bias, scale, result)


@triton.jit
def _code_terms(
    codebook,
    stride_g,
    stride_k,
    stride_d,
    bias,
    scale,
    form,
    K,
    padded,
    D,
    plane,
    METRIC: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(padded, BLOCK_K)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    k64 = k.to(tl.int64)
    codes = codebook + g * stride_g + k64 * stride_k
    d = tl.arange(0, BLOCK_D)

    largest = tl.zeros([BLOCK_K], tl.float32)
    broken = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, D, BLOCK_D):
        at = codes[:, None] + (start + d).to(tl.int64)[None, :] * stride_d
        inside = (k < K)[:, None] & (start + d < D)[None, :]
        size = tl.abs(tl.load(at, mask=inside, other=0.0).to(tl.float32))
        finite = size < float("inf")
        largest = tl.maximum(largest, tl.max(tl.where(finite, size, 0.0), 1))
        broken = tl.maximum(broken, tl.max(tl.where(finite, 0, 1), 1))
    wins = (broken == 0) & (k < K)

    # Scaling by the largest entry keeps the norm of very small and very large codes.
    unit = tl.where(largest > 0.0, largest, 1.0)
    if METRIC != 2:
        unit = tl.full([BLOCK_K], 1.0, tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    if METRIC != 1:
        for start in range(0, D, BLOCK_D):
            at = codes[:, None] + (start + d).to(tl.int64)[None, :] * stride_d
            inside = wins[:, None] & (start + d < D)[None, :]
            c = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            c = tl.div_rn(c, unit[:, None] + tl.zeros_like(c))
            squares += tl.sum(c * c, 1)
    norm = tl.where(squares > 0.0, tl.sqrt_rn(squares), 1.0)

    start_score = tl.zeros([BLOCK_K], tl.float32)
    if METRIC == 0:
        start_score = tl.minimum(squares, 3.4028234663852886e38) * 0.5
    tl.store(bias + g * padded + k, tl.where(wins, start_score, float("inf")), mask=k < padded)
    if METRIC == 2 and FORM == 0:
        inverse = tl.minimum(
            tl.div_rn(tl.div_rn(tl.full([BLOCK_K], 1.0, tl.float32), unit), norm), 3.0e38
        )
        tl.store(scale + g * padded + k, inverse, mask=k < padded)

    if FORM != 0:
        for start in range(0, D, BLOCK_D):
            column = start + d
            at = codes[:, None] + column.to(tl.int64)[None, :] * stride_d
            inside = wins[:, None] & (column < D)[None, :]
            c = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if METRIC == 2:
                c = tl.div_rn(c, unit[:, None] + tl.zeros_like(c))
                c = tl.div_rn(c, norm[:, None] + tl.zeros_like(c))
            if FORM == 1:
                high, middle, low = three_halves(c)
                out = form + (g * K + k64)[:, None] * D + column.to(tl.int64)[None, :]
                inside = (k < K)[:, None] & (column < D)[None, :]
                tl.store(out, high, mask=inside)
                tl.store(out + plane, middle, mask=inside)
                tl.store(out + plane + plane, low, mask=inside)
            else:
                out = form + (g * D + column.to(tl.int64)[None, :]) * padded + k[:, None]
                tl.store(out, -c, mask=(k < padded)[:, None] & (column < D)[None, :])


@triton.jit
def three_halves(c):
    """Three bf16 numbers whose sum is the finite fp32 number c: 3 * 8 bits hold its 24."""
    high = tl.clamp(c, -3.3895313892515355e38, 3.3895313892515355e38).to(tl.bfloat16)
    rest = c - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low
