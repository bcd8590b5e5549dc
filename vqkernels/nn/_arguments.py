"""What VectorQuantize accepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def for_codebook(rows: Tensor, codebook: Tensor) -> Tensor:
    """Half-precision rows go with any book; float64 and mixed ones take the book's dtype."""
    halves = (torch.float16, torch.bfloat16)
    mixable = rows.dtype == codebook.dtype or (
        rows.dtype in halves and codebook.dtype == torch.float32
    )
    return rows if mixable else rows.to(codebook.dtype)


def as_mask(
    mask: Tensor | None, lens: Tensor | None, tokens: Tensor, single: bool
) -> Tensor | None:
    if mask is not None and lens is not None:
        raise ValueError("mask and lens exclude each other, got both")
    if lens is not None:
        if tokens.dim() != 3:
            raise ValueError(f"lens goes with sequences [B, N, dim], got {list(tokens.shape)}")
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lens[:, None]
    elif mask is not None and single:
        mask = mask[:, None]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens.shape[:-1]):
        raise ValueError(
            f"mask must be bool {list(tokens.shape[:-1])}, got {mask.dtype} {list(mask.shape)}"
        )
    return mask


def check_arguments(
    dim: int,
    codebook_size: int,
    heads: int,
    accept_image_fmap: bool,
    accept_3d_fmap: bool,
    use_cosine_sim: bool,
    ema_update: bool,
    learnable_codebook: bool,
) -> None:
    for name, value in (("dim", dim), ("codebook_size", codebook_size), ("heads", heads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if accept_image_fmap and accept_3d_fmap:
        raise ValueError("accept_image_fmap and accept_3d_fmap exclude each other, got both")
    if learnable_codebook and use_cosine_sim:
        raise ValueError("use_cosine_sim needs learnable_codebook=False, got True")
    if learnable_codebook and ema_update:
        raise ValueError("learnable_codebook needs ema_update=False, got True")


def refuse(**arguments: Any) -> None:
    """Raise for the arguments of vector-quantize-pytorch that are switched on but not supported."""
    for name, value in arguments.items():
        if value is not None and not (isinstance(value, (bool, int, float)) and not value):
            raise NotImplementedError(f"{name} is not supported, got {value!r}")


def is_distributed() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
