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


def per_vector(rows: Tensor, vector: Tensor) -> Tensor:
    """`[B, N, D]` summed over the tokens that each vector serves, in its shape and dtype."""
    batch, tokens, dim = rows.shape
    frames = 1 if vector.dim() == 2 else vector.shape[1]
    sums = rows.reshape(batch, frames, tokens // frames, dim).sum(2)  # [B, F, D]
    return sums.reshape(vector.shape).to(vector.dtype)
