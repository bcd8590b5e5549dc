"""Scaled dot-product attention, with the arguments of PyTorch's.

    o = softmax(scale * q k^T + mask) v

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_floating, check_same_device
from vqkernels.reference import attention as reference


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of N queries to M keys.

    Args:
        q: `[B, H, N, d]`, floating point; strides are free, as in a view of a packed qkv.
        k, v: `[B, H, M, d]` and `[B, H, M, e]`; with `enable_gqa` their H may divide q's.
        attn_mask: broadcasts to `[B, H, N, M]`; bool (True = attend) or floating (added).
        is_causal: query i attends to keys 0..i; excludes `attn_mask`.
        scale: factor of the scores, 1 / sqrt(d) by default.
        return_lse: also return the logarithm of the softmax's denominator.

    Returns:
        `[B, H, N, e]` in q's dtype; with `return_lse` also `[B, H, N]` in fp32 (float64 for
        float64). A query without any key gives zeros and -inf.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ.
        ValueError: a shape or device that does not fit, or both `attn_mask` and `is_causal`.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(name, tensor)
        check_same_device(name, tensor, "q", q)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, H, N, d], got shape {list(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    _check_shapes(q, k, v, enable_gqa)
    if attn_mask is not None:
        _check_mask(attn_mask, (*q.shape[:3], k.shape[2]), q)
        if is_causal:
            raise ValueError("attn_mask and is_causal exclude each other, got both")
    select("attention", q, k, v)
    return reference.attention(
        q,
        k,
        v,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    batch, heads, _, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k must be [{batch}, H, M, {dim}], got shape {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must be [{batch}, {k.shape[1]}, {k.shape[2]}, e], got shape {list(v.shape)}"
        )
    if k.shape[1] != heads and not enable_gqa:
        raise ValueError(f"k must have q's {heads} heads, got {k.shape[1]} (see enable_gqa)")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k's heads must divide q's {heads}, got {k.shape[1]}")


def _check_mask(attn_mask: Tensor, scores: tuple[int, ...], q: Tensor) -> None:
    check_same_device("attn_mask", attn_mask, "q", q)
    if attn_mask.dtype not in (torch.bool, q.dtype):
        raise TypeError(f"attn_mask must be bool or {q.dtype}, got {attn_mask.dtype}")
    fits = attn_mask.dim() <= 4 and all(
        size in (1, full)
        for size, full in zip(reversed(attn_mask.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask must broadcast to {list(scores)}, got shape {list(attn_mask.shape)}"
        )
