"""Rows of a codebook by index. Its gradient is `code_statistics`: a sum over each code's rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_codebook, check_same_device, check_tensor
from vqkernels.ops._library import define, differentiable, fake
from vqkernels.ops.code_statistics import _code_statistics
from vqkernels.reference import gather_codes as reference

_gather_codes = define(
    "gather_codes(Tensor codebook, Tensor indices) -> Tensor", reference.gather_codes
)


@fake(_gather_codes)
def _(codebook: Tensor, indices: Tensor, backend: str) -> Tensor:
    return codebook.new_empty((*indices.shape, codebook.shape[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codebook, indices, ctx.backend = inputs
    ctx.codebook_shape, ctx.dtype = codebook.shape, codebook.dtype
    ctx.save_for_backward(indices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    books = ctx.codebook_shape[0] if len(ctx.codebook_shape) == 3 else 0
    _, sums = _code_statistics(grad, indices, ctx.codebook_shape[-2], None, books, ctx.backend)
    return sums.to(ctx.dtype), None, None


differentiable(_gather_codes, _backward, _save)


def gather_codes(codebook: Tensor, indices: Tensor) -> Tensor:
    """Codes by index. PyTorch equivalent: `torch.nn.functional.embedding(indices, codebook)`.

    Args:
        codebook: `[K, D]` or `[G, K, D]`.
        indices: int64 `[...]` with one book, `[..., G, N]` with G books; -1 marks a missing code.

    Returns:
        `[..., D]` in the codebook's dtype. -1 gives zeros and no gradient. The gradient of the
        codebook is summed in a fixed order, the same bits on every run.

    Raises:
        IndexError: an index outside [-1, K - 1] (on a GPU such an index gives zeros).
        TypeError, ValueError: wrong dtypes, shapes or devices.
    """
    check_codebook(codebook)
    check_tensor("indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if codebook.dim() == 3 and (indices.dim() < 2 or indices.shape[-2] != codebook.shape[0]):
        raise ValueError(
            "indices must be [..., G, N] with a codebook [G, K, D], got indices "
            f"{list(indices.shape)} and codebook {list(codebook.shape)}"
        )
    check_same_device("indices", indices, "codebook", codebook)
    rows: Tensor = _gather_codes(codebook, indices, select("gather_codes", codebook, indices))
    return rows
