"""Triton's Box-Muller alone, on words of the test's choice. Imports Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.normals import _box_muller

_BLOCK = 1024


def pairs_of(words: Tensor) -> Tensor:
    """float32 `[N, 2]` of int64 words `[N, 2]`; N is a multiple of 1024."""
    pairs = torch.empty(words.shape, device=words.device)
    _pairs[(len(words) // _BLOCK,)](words, pairs, N=_BLOCK)
    return pairs


def extreme_words(device: str) -> Tensor:
    """Words where the radius is largest and where it vanishes, and at the turns of the angle."""
    spread = torch.logspace(0, 9.632, 30000, dtype=torch.float64).long().clamp(max=2**32 - 1)
    turns = (torch.arange(8)[:, None] * 2**29 + torch.arange(-40, 40)).reshape(-1) % 2**32
    # Where the exponent of (word + 1) / 2^32 over sqrt(1/2) changes.
    half = (2**32 / 2**0.5 + torch.arange(-500, 500)).long()
    first = torch.cat([spread, 2**32 - 1 - spread, turns, half, torch.tensor([0, 2**32 - 1])])
    second = torch.cat([first.flip(0), torch.randint(0, 2**32, first.shape)])
    words = torch.stack([first.repeat(2), second], 1)
    return torch.cat([words, words[: -len(words) % _BLOCK]]).to(device)


@triton.jit
def _pairs(words, pairs, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    first, second = tl.load(words + 2 * i), tl.load(words + 2 * i + 1)
    a, b = _box_muller(first.to(tl.uint32), second.to(tl.uint32))
    tl.store(pairs + 2 * i, a)
    tl.store(pairs + 2 * i + 1, b)
