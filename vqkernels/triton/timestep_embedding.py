"""Launch of `timestep_embedding`: cosines, then sines, of t at geometric frequencies.

Angles, frequencies and the removal of quarter turns are float64, since 1e4 turns have to keep
2e-6; what is left lies within pi / 4 and is done in float64 as well. Beyond 2^49 quarter turns a
float64 angle has no digits left, and the result is any number within [-1, 1].
Floor: 4 bytes written for each of B dim numbers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch

_BLOCK = 256
_TWO_OVER_PI = tl.constexpr(0.63661977236758134308)
# pi / 2 = high + low
_HIGH = tl.constexpr(float.fromhex("0x1.921fb54442d18p0"))
_LOW = tl.constexpr(float.fromhex("0x1.1a62633145c07p-54"))


def timestep_embedding(t: Tensor, dim: int, max_period: float) -> Tensor:
    """float32 `[B, dim]`."""
    out = t.new_empty((t.shape[0], dim), dtype=torch.float32)
    half = dim // 2
    # A kernel's scalars are fp32, so a float64 takes two.
    step = -math.log(max_period) / max(half, 1)
    (high,) = struct.unpack("f", struct.pack("f", step))
    if out.numel() > 0:
        launch(
            _timestep_embedding,
            out.shape[0] * triton.cdiv(dim, _BLOCK),
            t,
            t.stride(0),
            out,
            dim,
            high,
            step - high,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out


@triton.jit
def _timestep_embedding(t, t_stride, out, dim, step, more, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row."""
    blocks = tl.cdiv(dim, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    half = dim // 2
    of_sine = column >= half
    i = tl.where(of_sine, column - half, column).to(tl.float64)
    angle = tl.load(t + b * t_stride).to(tl.float64) * tl.exp(i * step + i * more)

    turns = tl.floor(angle * _TWO_OVER_PI + 0.5)
    r = (angle - turns * _HIGH) - turns * _LOW
    # A NaN stays one.
    r = tl.where(r > 0.8, 0.8, tl.where(r < -0.8, -0.8, r))
    square = r * r
    sine = -1.0 / 6.0 + square * (1.0 / 120.0 + square * (-1.0 / 5040.0 + square / 362880.0))
    sine = r + r * square * sine
    cosine = -0.5 + square * (1.0 / 24.0 + square * (-1.0 / 720.0 + square / 40320.0))
    cosine = 1.0 + square * cosine
    # The cosine is the sine a quarter turn on.
    quarter = turns + tl.where(of_sine, 0.0, 1.0)
    quarter = quarter - 4.0 * tl.floor(quarter * 0.25)
    odd = (quarter == 1.0) | (quarter == 3.0)
    value = tl.where(odd, cosine, sine)
    value = tl.where(quarter >= 2.0, -value, value)
    value = tl.where(column >= 2 * half, 0.0, value)
    tl.store(out + b * dim + column, value.to(tl.float32), mask=column < dim)
