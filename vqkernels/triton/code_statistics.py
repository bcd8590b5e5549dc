"""Launches of `code_statistics`, which is also the book's gradient of `gather_codes`."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.triton.rows import row_grid
from vqkernels.triton.segment_sum import segment_sum, segments


def code_statistics(
    x: Tensor, indices: Tensor, codebook_size: int, weights: Tensor | None, books: int
) -> tuple[Tensor, Tensor]:
    """float32 counts `[K]` or `[G, K]` and sums `[K, D]` or `[G, K, D]`; `books` = 0 for one book.

    An index outside [0, K - 1] is skipped.
    """
    shape = (max(books, 1), codebook_size)
    counts = x.new_zeros(shape, dtype=torch.float32)
    sums = x.new_zeros((*shape, x.shape[-1]), dtype=torch.float32)
    if indices.numel() > 0:
        rows = row_grid([x], books > 0)
        found = segments(indices, rows, codebook_size)
        weights = None if weights is None else weights.contiguous()
        segment_sum(found, rows, sums, counts=counts, weights=weights)
    return (counts, sums) if books else (counts[0], sums[0])
