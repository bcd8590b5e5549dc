"""Philox4x32-10 in int64 arithmetic, then Box-Muller in float64.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3",
doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def normal_noise(
    shape: tuple[int, ...],
    *,
    seed: Tensor,
    sample_ids: Tensor,
    step: Tensor,
    stream: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`seed`, `step` and `stream` are int64 scalars, `sample_ids` int64 `[B]`."""
    batch, elements = shape[0], math.prod(shape[1:])
    quads = torch.arange((elements + 3) // 4, device=sample_ids.device)
    counter = torch.broadcast_tensors(quads, sample_ids[:, None], step, stream)  # 4 of [B, E / 4]
    words = philox4x32(counter, (seed, seed >> 32))
    a, b = _box_muller(words[0], words[1])
    c, d = _box_muller(words[2], words[3])
    normals = torch.stack([a, b, c, d], dim=-1).flatten(1)[:, :elements]
    return normals.reshape(batch, *shape[1:]).float().to(dtype)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds; every word is an int64 tensor of which the low 32 bits count."""
    c0, c1, c2, c3 = (word & _WORD for word in counter)
    k0, k1 = (word & _WORD for word in key)
    for _ in range(10):
        # An int64 product wraps modulo 2^64: its bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            (p0 >> 32 & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    radius = (-2 * ((first + 1).double() * 2.0**-32).log()).sqrt()
    angle = second.double() * (2 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()
