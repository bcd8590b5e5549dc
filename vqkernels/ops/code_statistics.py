"""How often each code was chosen and the sum of its rows: what an EMA codebook learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_floating, check_labels, check_same_device
from vqkernels.ops._library import define, fake, not_differentiable
from vqkernels.reference import code_statistics as reference

_code_statistics = define(
    "code_statistics(Tensor x, Tensor indices, SymInt codebook_size, Tensor? weights, SymInt books)"
    " -> (Tensor, Tensor)",
    lambda x, indices, codebook_size, weights, books: reference.code_statistics(
        x, indices, codebook_size, weights, books=books
    ),
)


@fake(_code_statistics)
def _(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    weights: Tensor | None,
    books: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (books, codebook_size) if books else (codebook_size,)
    counts = x.new_empty(shape, dtype=torch.float32)
    return counts, x.new_empty((*shape, x.shape[-1]), dtype=torch.float32)


not_differentiable(_code_statistics, "statistics have no gradient; detach x and weights")


def code_statistics(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    weights: Tensor | None = None,
    *,
    books: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows assigned to each code.

    PyTorch equivalent: `bincount(indices, minlength=K)` and `zeros(K, D).index_add(0, indices, x)`.

    Args:
        x: `[..., N, D]`, or `[..., G, N, D]` with `books=G`. Any strides.
        indices: int64, x's shape without D; -1 is skipped.
        codebook_size: K.
        weights: optional floating weight of each row, the shape of `indices`.
        books: G if each group of x has its own book, None for one book.

    Returns:
        float32 counts `[K]` or `[G, K]` and sums `[K, D]` or `[G, K, D]`, deterministic: the same
        bits whatever the number of threads.

    Raises:
        IndexError: an index outside [-1, K - 1] (on a GPU such a row is skipped).
        TypeError, ValueError: wrong dtypes, shapes or devices.
    """
    check_floating("x", x)
    if x.dim() < (2 if books is None else 3):
        raise ValueError(f"x must be [..., N, D] (or [..., G, N, D]), got shape {list(x.shape)}")
    if books is not None and x.shape[-3] != books:
        raise ValueError(f"x must be [..., {books}, N, D] with books={books}, got {list(x.shape)}")
    if codebook_size < 1:
        raise ValueError(f"codebook_size must be at least 1, got {codebook_size}")
    check_labels("indices", indices, x.shape[:-1], (torch.int64,))
    check_same_device("indices", indices, "x", x)
    if weights is not None:
        halves = (torch.float32, torch.float16, torch.bfloat16)
        check_labels("weights", weights, x.shape[:-1], halves)
        check_same_device("weights", weights, "x", x)
        weights = weights.to(torch.float32)
    backend = select("code_statistics", x, indices)
    counts, sums = _code_statistics(x, indices, codebook_size, weights, books or 0, backend)
    return counts, sums
