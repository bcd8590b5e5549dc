"""`quantize` and its gradients in float64, written out from the formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Quantized:
    """float64, but for `indices`."""

    quantized: Tensor
    loss: Tensor
    counts: Tensor
    grad_x: Tensor
    grad_x_terms: Tensor  # sum of the magnitudes of what is added up in grad_x
    grad_codebook: Tensor
    grad_codebook_terms: Tensor


def rows_of_books(values: Tensor, groups: int | None) -> Tensor:
    """`[..., N, ?]` as `[1, R, ?]`, or `[..., G, N, ?]` as `[G, R, ?]`."""
    if groups is None:
        return values.reshape(1, -1, values.shape[-1])
    return values.movedim(-3, 0).reshape(groups, -1, values.shape[-1])


def rotation(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix lambda R of the rotation trick, `[..., D, D]`: code = lambda R x.

    R = I - 2 w w^T + 2 v u^T, with u, v, w the directions of x, the code and u + v, and
    lambda = |code| / |x|. Source: Fifty et al., arXiv:2410.06424. Also returns, `[...]`, by what a
    relative error of u + v grows in a gradient of length 1: where x and its code point in opposite
    directions, w is lost.
    """

    def direction(a: Tensor) -> Tensor:
        return a / a.norm(dim=-1, keepdim=True).clamp(min=1e-6)

    u, v = direction(x), direction(code)
    w = direction(u + v)
    turn = torch.eye(x.shape[-1], dtype=x.dtype) - 2 * w[..., None] * w[..., None, :]
    turn = turn + 2 * v[..., None] * u[..., None, :]
    size = code.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-6)
    condition = size * (2 + 2 / (u + v).norm(dim=-1).clamp(min=1e-6))
    return size[..., None, None] * turn, condition


def quantize_formulas(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    kept: Tensor,
    grad_quantized: Tensor,
    grad_commitment: float,
    grad_codebook_loss: float,
    gradient: str = "straight_through",
) -> Quantized:
    """Outputs for these indices, and gradients of

    sum(quantized * grad_quantized) + grad_commitment * commitment_loss
    + grad_codebook_loss * codebook_loss.
    """
    groups = codebook.shape[0] if codebook.dim() == 3 else None
    books = (codebook if groups is not None else codebook[None]).double()  # [G, K, D]
    labels = rows_of_books(indices[..., None], groups)[..., 0]  # [G, R]
    found = labels >= 0
    of_book = torch.arange(len(books))[:, None]
    code = books[of_book, labels.clamp(min=0)]  # [G, R, D]
    rows = rows_of_books(x, groups).double()
    elements = max(1, int(found.sum()) * x.shape[-1])

    difference = torch.where(found[..., None], rows - code, 0.0)
    blank = torch.where(rows_of_books(kept[..., None], groups), torch.nan, 0.0)
    arriving = rows_of_books(grad_quantized, groups).double()
    grad, terms = torch.zeros_like(rows), torch.zeros_like(rows)
    if gradient == "straight_through":
        grad, terms = arriving, arriving.abs()
    if gradient == "rotation":
        turn, condition = rotation(rows.nan_to_num(0, 0, 0), code.nan_to_num(0, 0, 0))
        grad = (turn.mT @ arriving[..., None])[..., 0]
        terms = condition[..., None] * arriving.norm(dim=-1, keepdim=True)
    from_loss = grad_commitment * 2 / elements * difference
    terms = torch.where(found[..., None], terms + from_loss.abs(), 0.0)
    grad = torch.where(found[..., None], grad + from_loss, 0.0)

    counts = torch.zeros(books.shape[:2], dtype=torch.float64)
    grad_books, book_terms = torch.zeros_like(books), torch.zeros_like(books)
    for book in range(len(books)):
        used = labels[book][found[book]]
        counts[book].index_add_(0, used, torch.ones(len(used), dtype=torch.float64))
        grad_books[book].index_add_(0, used, -difference[book][found[book]])
        magnitudes = (rows.abs() + code.abs())[book][found[book]]
        book_terms[book].index_add_(0, used, magnitudes)
    scale = grad_codebook_loss * 2 / elements

    def restored(rows_again: Tensor) -> Tensor:
        if groups is None:
            return rows_again.reshape(x.shape)
        return rows_again.reshape(groups, *x.shape[:-3], *x.shape[-2:]).movedim(0, -3)

    return Quantized(
        quantized=restored(torch.where(found[..., None], code, blank)),
        loss=difference.square().sum() / elements,
        counts=counts.reshape(codebook.shape[:-1]),
        grad_x=restored(grad),
        grad_x_terms=restored(terms),
        grad_codebook=(scale * grad_books).reshape(codebook.shape),
        grad_codebook_terms=(scale * book_terms).reshape(codebook.shape),
    )
