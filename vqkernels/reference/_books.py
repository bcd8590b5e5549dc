"""How `[..., N, D]` rows meet one book `[K, D]` or several `[G, K, D]`."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_per_book(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as `[G, R, D]` and books as `[G, K, D]`; one book counts as G = 1."""
    if codebook.dim() == 2:
        return x.reshape(1, -1, x.shape[-1]), codebook[None]
    return x.movedim(-3, 0).reshape(codebook.shape[0], -1, x.shape[-1]), codebook


def labels_per_book(labels: Tensor, groups: int | None) -> Tensor:
    """One value a row, `[..., N]` or `[..., G, N]`, as `[G, R]`."""
    if groups is None:
        return labels.reshape(1, -1)
    return labels.movedim(-2, 0).reshape(groups, -1)


def rows_restored(rows: Tensor, shape: torch.Size, groups: int | None) -> Tensor:
    """`[G, R, D]` back to x's shape `[..., N, D]` or `[..., G, N, D]`."""
    if groups is None:
        return rows.reshape(shape)
    return rows.reshape(groups, *shape[:-3], *shape[-2:]).movedim(0, -3)


def labels_restored(labels: Tensor, shape: torch.Size, groups: int | None) -> Tensor:
    """`[G, R]` back to `[..., N]` or `[..., G, N]`; `shape` is the result's."""
    if groups is None:
        return labels.reshape(shape)
    return labels.reshape(groups, *shape[:-2], shape[-1]).movedim(0, -2).contiguous()


def group_count(codebook: Tensor) -> int | None:
    return codebook.shape[0] if codebook.dim() == 3 else None
