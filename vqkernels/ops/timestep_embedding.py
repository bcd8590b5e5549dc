"""Sinusoidal embedding of diffusion timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_floating, check_tensor
from vqkernels.ops._library import define, fake, not_differentiable
from vqkernels.reference import timestep_embedding as reference

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_timestep_embedding = define(
    "timestep_embedding(Tensor t, SymInt dim, float max_period) -> Tensor",
    reference.timestep_embedding,
)


@fake(_timestep_embedding)
def _(t: Tensor, dim: int, max_period: float, backend: str) -> Tensor:
    return t.new_empty((t.shape[0], dim), dtype=torch.float32)


not_differentiable(_timestep_embedding, "timesteps carry no gradient; detach t")


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of t at `dim / 2` geometric frequencies.

        out[b, i]           = cos(t[b] * max_period^(-i / (dim // 2)))
        out[b, dim // 2 + i] = sin(t[b] * max_period^(-i / (dim // 2)))

    an odd `dim` ends in a zero. Source: Vaswani et al., arXiv:1706.03762; the order and the
    frequencies are those of DiT (Peebles and Xie, arXiv:2212.09748).

    Args:
        t: `[B]` timesteps, integer or floating, may be fractional.
        dim: width of the embedding, at least 1.
        max_period: the longest period is 2 pi max_period; must be positive.

    Returns:
        float32 `[B, dim]`, within 2e-6 of the float64 value for |t| <= 1e4.

    Raises:
        TypeError, ValueError: wrong dtype, shape or range.
    """
    check_tensor("t", t)
    if t.dtype in _INTEGERS:
        t = t.to(torch.float32)
    check_floating("t", t)
    if t.dim() != 1:
        raise ValueError(f"t must be [B], got shape {list(t.shape)}")
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if not max_period > 0:
        raise ValueError(f"max_period must be positive, got {max_period}")
    backend = select("timestep_embedding", t)
    embedding: Tensor = _timestep_embedding(t, dim, max_period, backend)
    return embedding
