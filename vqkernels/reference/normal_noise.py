"""Philox4x32-10 in int64 arithmetic, then Box-Muller in float64.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3",
doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def normal_noise(
    shape: Sequence[int], key: Tensor, sample_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`key` is int64 `[3]`: seed, step, stream; `sample_ids` int64 `[B]` or None for 0..B-1."""
    batch, elements = shape[0], math.prod(shape[1:])
    quads = torch.arange((elements + 3) // 4, device=key.device)
    normals = _four_normals(quads, _ids(sample_ids, batch, key)[:, None], key[1], key)
    return normals.flatten(1)[:, :elements].reshape(shape).float().to(dtype)


def normals_of_steps(
    shape: Sequence[int], key: Tensor, sample_ids: Tensor | None, steps: Tensor
) -> Tensor:
    """As `normal_noise`, in fp32, where `steps` broadcasts to `shape`: each element has its own."""
    batch, elements = shape[0], math.prod(shape[1:])
    element = torch.arange(elements, device=key.device).expand(batch, elements)
    ids = _ids(sample_ids, batch, key)[:, None]
    each = steps.expand(shape).reshape(batch, elements)
    normals = _four_normals(element // 4, ids, each, key)  # [B, E, 4]
    return normals.gather(2, element[..., None] % 4).reshape(shape).float()


def _ids(sample_ids: Tensor | None, batch: int, key: Tensor) -> Tensor:
    return torch.arange(batch, device=key.device) if sample_ids is None else sample_ids


def _four_normals(quads: Tensor, ids: Tensor, step: Tensor, key: Tensor) -> Tensor:
    """Float64 `[..., 4]`, the normals of each counter."""
    counter = torch.broadcast_tensors(quads, ids, step, key[2])
    words = philox4x32(counter, (key[0], key[0] >> 32))
    return torch.stack(_box_muller(*words[:2]) + _box_muller(*words[2:]), dim=-1)


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
