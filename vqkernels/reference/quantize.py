from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.reference._books import (
    group_count,
    labels_per_book,
    rows_per_book,
)
from vqkernels.reference.code_statistics import code_statistics
from vqkernels.reference.gather_codes import gather_codes
from vqkernels.reference.nearest_code import nearest_code


def quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    gradient: str = "straight_through",
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    indices = nearest_code(x, codebook, metric=metric)
    kept = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    indices = torch.where(kept, indices, -1)

    found = (indices >= 0)[..., None]
    code = gather_codes(codebook, indices)
    quantized = torch.where(found, code, torch.where(kept[..., None], torch.nan, 0.0)).to(x.dtype)
    difference = torch.where(found, x.double() - code.double(), 0.0)
    elements = (found.sum() * x.shape[-1]).clamp(min=1)
    loss = (difference.square().sum() / elements).float()
    counts, _ = code_statistics(
        x, indices, codebook.shape[-2], books=codebook.shape[0] if codebook.dim() == 3 else 0
    )
    return torch.empty_like(x).copy_(quantized), indices, loss, loss.clone(), counts


def quantize_backward_x(
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    gradient: str,
) -> Tensor:
    found = (indices >= 0)[..., None]
    grad = torch.zeros_like(x, dtype=torch.float64)
    if grad_quantized is not None and gradient == "straight_through":
        grad = grad + grad_quantized.double()
    if grad_quantized is not None and gradient == "rotation":
        grad = grad + rotated_gradient(grad_quantized, x, gather_codes(codebook, indices))
    if grad_commitment is not None:
        elements = (found.sum() * x.shape[-1]).clamp(min=1)
        difference = x.double() - gather_codes(codebook, indices).double()
        grad = grad + grad_commitment.double() * 2 / elements * difference
    return torch.empty_like(x).copy_(torch.where(found, grad, 0.0))


def rotated_gradient(grad: Tensor, x: Tensor, code: Tensor) -> Tensor:
    """lambda (g - 2 w (w.g) + 2 u (v.g)) in float64, with u and v the directions of x and the code,
    w that of u + v, lambda = |code| / |x|. Source: Fifty et al., arXiv:2410.06424, section 4.2."""
    g, x, code = grad.double(), x.double(), code.double()
    norm_x = x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    size = code.norm(dim=-1, keepdim=True)
    u, v = x / norm_x, code / size.clamp(min=1e-6)
    w = u + v
    w = w / w.norm(dim=-1, keepdim=True).clamp(min=1e-6)

    def along(a: Tensor) -> Tensor:
        return (a * g).sum(-1, keepdim=True)

    return size / norm_x * (g - 2 * w * along(w) + 2 * u * along(v))


def quantize_backward_codebook(
    grad_codebook_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor
) -> Tensor:
    rows, books = rows_per_book(x, codebook)  # [G, R, D], [G, K, D]
    labels = labels_per_book(indices, group_count(codebook))  # [G, R]
    elements = ((labels >= 0).sum() * x.shape[-1]).clamp(min=1)
    grad = torch.zeros_like(books, dtype=torch.float64)
    for book in range(books.shape[0]):
        used = labels[book] >= 0
        chosen = labels[book][used]
        difference = books[book][chosen].double() - rows[book][used].double()
        grad[book].index_add_(0, chosen, difference)
    grad = grad * grad_codebook_loss.double() * 2 / elements
    return grad.reshape(codebook.shape).to(codebook.dtype)


__all__ = ["quantize", "quantize_backward_codebook", "quantize_backward_x"]
