"""How a modulation vector meets its tokens."""

from __future__ import annotations

from torch import Tensor


def per_token(vector: Tensor, x: Tensor) -> Tensor:
    """`[B, D]` or `[B, F, D]` (F divides N; F = N is per token), to broadcast against `[B, N, D]`.

    With F vectors a sample, each serves N / F consecutive tokens.
    """
    if vector.dim() == 2:
        return vector[:, None]  # [B, 1, D]
    frames, tokens = vector.shape[1], x.shape[1]
    if frames in (1, tokens):
        return vector
    return vector.repeat_interleave(tokens // frames, dim=1)  # [B, N, D]
