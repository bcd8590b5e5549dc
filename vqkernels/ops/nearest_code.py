"""Nearest-codebook lookup: for each row of x the index of its nearest code.

    l2      argmin_k |x - c_k|^2      searched as |c'_k|^2 - 2 x'.c'_k, without |x|^2
    dot     argmax_k x.c_k
    cosine  argmax_k x.c_k / |c_k|

The N x K matrix is never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import (
    METRICS,
    check_choice,
    check_codebook,
    check_rows,
    check_same_device,
    check_tensor,
)
from vqkernels.ops._library import define, fake
from vqkernels.reference import nearest_code as reference

_nearest_code = define(
    "nearest_code(Tensor x, Tensor codebook, str metric, str precision, Tensor? packed) -> Tensor",
    lambda x, codebook, metric, precision, packed: reference.nearest_code(
        x, codebook, metric=metric
    ),
)


@fake(_nearest_code)
def _(
    x: Tensor, codebook: Tensor, metric: str, precision: str, packed: Tensor | None, backend: str
) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    precision: str = "exact",
    packed: Tensor | None = None,
) -> Tensor:
    """Index of each row's nearest code. PyTorch equivalent: `torch.cdist(x, codebook).argmin(-1)`.

    Exactness, with u = 2^-53 on the CPU and CUDA backends and u = 2^-24 on Triton, and m = the mean
    of at most 512 of the codes on the CPU backend for "l2", else 0: the chosen code's squared
    distance in float64 exceeds the smallest by at most
    `4 (D + 8) u (|x - m| + max_k |c_k - m|)^2`; for "dot" the similarity falls short by at most
    `4 (D + 8) u |x| max_k |c_k|`, for "cosine" (times |x|) by `4 (D + 8) u |x|`. (The CPU and CUDA
    kernels screen codes in int8, fp16 or fp32, and decide every code that the screen's proven bound
    leaves in float64.) Bitwise-equal codes give the lowest index. A backend gives the same bits
    whatever the number of threads or the batch that a row came in.

    Args:
        x: rows, `[N, D]` or `[..., N, D]` with one book, `[..., G, N, D]` with G books. Any
            strides; nothing is copied.
        codebook: `[K, D]`, or `[G, K, D]` for one book a group. float32, float16, bfloat16 or
            float64, x's dtype; a float32 book also goes with half-precision rows.
        metric: "l2", "dot" or "cosine".
        precision: "exact"; "fast" may skip re-checks (no backend does so yet).
        packed: `pack_codebook(codebook, metric=metric)`, to save the preparation of the book
            (worth it for few rows or a frozen book). It must be made anew when the book changes.

    Returns:
        int64 `[..., N]` or `[..., G, N]`. A row with a NaN or an infinity gets -1, and so does
        every row if no code is finite; a code with a NaN or an infinity is never chosen.

    Raises:
        TypeError: not a tensor, not floating, or two different half precisions.
        ValueError: shapes that do not go together, several devices, unknown metric or precision,
            an empty codebook, a `packed` that belongs to another book or metric.
    """
    check_rows("x", x, codebook)
    check_choice("metric", metric, METRICS)
    check_choice("precision", precision, ("exact", "fast"))
    if packed is not None:
        check_packed(packed, codebook)
    backend = select("nearest_code", x, codebook)
    result: Tensor = _nearest_code(x, codebook, metric, precision, packed, backend)
    return result


_pack_codebook = define(
    "pack_codebook(Tensor codebook, str metric) -> Tensor",
    lambda codebook, metric: reference.pack_codebook(codebook, metric=metric),
)


@fake(_pack_codebook)
def _(codebook: Tensor, metric: str, backend: str) -> Tensor:
    return codebook.new_empty(_packed_shape(codebook), dtype=torch.float32)


def pack_codebook(codebook: Tensor, *, metric: str = "l2") -> Tensor:
    """Prepare a book once for many calls of `nearest_code` or `quantize`.

    Args:
        codebook: `[K, D]` or `[G, K, D]`.
        metric: the metric of the calls to come.

    Returns:
        An opaque float32 tensor. It belongs to this book's present values, this metric and this
        process's instruction set: make it anew after every change, and do not save it.
    """
    check_codebook(codebook)
    check_choice("metric", metric, METRICS)
    packed: Tensor = _pack_codebook(codebook, metric, select("pack_codebook", codebook))
    return packed


def check_packed(packed: Tensor, codebook: Tensor) -> None:
    check_tensor("packed", packed)
    check_same_device("packed", packed, "codebook", codebook)
    expected = _packed_shape(codebook)
    if not packed.is_contiguous():
        raise ValueError("packed must be contiguous, as pack_codebook returns it")
    if packed.dtype != torch.float32 or tuple(packed.shape) != expected:
        raise ValueError(
            f"packed must be pack_codebook(codebook): float32 {list(expected)} for this codebook, "
            f"got {packed.dtype} {list(packed.shape)}"
        )


def _packed_shape(codebook: Tensor) -> tuple[int, int]:
    books = codebook.shape[0] if codebook.dim() == 3 else 1
    return books, reference.packed_size(codebook.shape[-2], codebook.shape[-1])
