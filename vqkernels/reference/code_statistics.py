from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.reference._books import labels_per_book


def code_statistics(
    x: Tensor, indices: Tensor, codebook_size: int, weights: Tensor | None = None, *, books: int = 0
) -> tuple[Tensor, Tensor]:
    """`books` = 0 for one book, else the G of `[..., G, N, D]`."""
    rows = x.reshape(1, -1, x.shape[-1]) if not books else x.movedim(-3, 0)
    rows = rows.reshape(max(books, 1), -1, x.shape[-1]).double()  # [G, R, D]
    labels = labels_per_book(indices, books or None)  # [G, R]
    if ((labels < -1) | (labels >= codebook_size)).any():
        raise IndexError(
            f"indices must lie in [-1, {codebook_size - 1}], got values from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    weight = torch.ones_like(labels, dtype=torch.float64)
    if weights is not None:
        weight = labels_per_book(weights, books or None).double()

    counts = rows.new_zeros(rows.shape[0], codebook_size)
    sums = rows.new_zeros(rows.shape[0], codebook_size, rows.shape[-1])
    for book in range(rows.shape[0]):
        used = labels[book] >= 0
        chosen, scale = labels[book][used], weight[book][used]
        counts[book].index_add_(0, chosen, scale)
        sums[book].index_add_(0, chosen, rows[book][used] * scale[:, None])
    counts, sums = counts.float(), sums.float()
    return (counts, sums) if books else (counts[0], sums[0])
