from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.reference._books import group_count, labels_per_book, rows_restored


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    groups = group_count(codebook)
    books = codebook if groups is not None else codebook[None]  # [G, K, D]
    labels = labels_per_book(indices, groups)  # [G, R]
    if ((labels < -1) | (labels >= books.shape[1])).any():
        raise IndexError(
            f"indices must lie in [-1, {books.shape[1] - 1}], got values from "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    one_of = torch.arange(books.shape[0], device=books.device)[:, None]
    rows = books[one_of, labels.clamp(min=0)]  # [G, R, D]
    rows = torch.where(labels[..., None] >= 0, rows, 0)
    return rows_restored(rows, torch.Size((*indices.shape, books.shape[-1])), groups).contiguous()
