"""The obvious nearest-code lookup: every distance, in float64, then the smallest."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.reference._books import (
    group_count,
    labels_restored,
    rows_per_book,
)

_SCORES_AT_ONCE = 1 << 24


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    precision: str = "exact",
    packed: Tensor | None = None,
) -> Tensor:
    rows, books = rows_per_book(x, codebook)  # [G, R, D], [G, K, D]
    labels = torch.stack([_nearest(r, c, metric) for r, c in zip(rows, books, strict=True)])
    return labels_restored(labels, x.shape[:-1], group_count(codebook))


def pack_codebook(codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """The reference has nothing to prepare: a blank of the right size."""
    books = codebook.shape[0] if codebook.dim() == 3 else 1
    size = packed_size(codebook.shape[-2], codebook.shape[-1])
    return codebook.new_zeros(books, size, dtype=torch.float32)


def packed_size(codebook_size: int, dim: int) -> int:
    """Words of one packed book, the same on every instruction set; as `csrc/cpu/packed_book.h`:
    header, centre, norms of the panels, fp32 panels and, by D, a tree of boxes or int8 panels."""
    codes = _round_up(codebook_size, 64)
    panels = _round_up(codes // 16, 16)
    words = 16 + _round_up(dim, 16) + 2 * panels + codes * (dim + 1)
    if dim <= 4:
        words += codes + (panels + _round_up(panels // 16, 16)) * (2 * dim + 1)
    if 32 <= dim <= 1 << 14:
        words += codes * (_round_up(dim, 4) // 4 + 2)
    return words


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def _nearest(rows: Tensor, codes: Tensor, metric: str) -> Tensor:
    rows, codes = rows.double(), codes.double()  # [R, D], [K, D]
    usable = codes.isfinite().all(-1)  # [K]
    codes = torch.where(usable[:, None], codes, 0.0)
    if metric == "cosine":
        codes = torch.nn.functional.normalize(codes, dim=-1, eps=1e-300)
    start = codes.square().sum(-1) / 2 if metric == "l2" else codes.new_zeros(codes.shape[0])
    start = torch.where(usable, start, torch.inf)  # [K]

    first = _first_of_equals(codes, usable)  # [K]
    found = rows.new_empty(rows.shape[0], dtype=torch.int64)
    for chunk in torch.arange(rows.shape[0], device=rows.device).split(
        max(1, _SCORES_AT_ONCE // codes.shape[0])
    ):
        score = start - rows[chunk] @ codes.T  # [r, K], half the squared distance up to |x|^2
        found[chunk] = first[score.argmin(-1)]
    hopeless = ~rows.isfinite().all(-1) | ~usable.any()
    return found.masked_fill(hopeless, -1)


def _first_of_equals(codes: Tensor, usable: Tensor) -> Tensor:
    """For each code the lowest index that holds the same usable code: a matrix product may round
    the same numbers differently in another column, and equal codes must give the lowest index."""
    _, kind = torch.unique(codes, dim=0, return_inverse=True)
    index = torch.arange(codes.shape[0], device=codes.device)
    lowest = torch.full_like(index, codes.shape[0])
    lowest.scatter_reduce_(0, kind, torch.where(usable, index, codes.shape[0]), "amin")
    return lowest[kind]
