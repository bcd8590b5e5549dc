"""Scaled dot-product attention, with the arguments of PyTorch's.

    o = softmax(scale * q k^T + mask) v

The softmax is taken over blocks of keys as they pass, and nothing of size N x M is stored; the
backward pass forms the weights anew from the logarithm of the softmax's denominator. Source:
Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1; the backward pass as in Dao et al. 2022,
arXiv:2205.14135.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from vqkernels.backends import pass_over, select, why_not
from vqkernels.ops._checks import check_floating, check_same_device
from vqkernels.ops._library import define, differentiable, fake, not_differentiable
from vqkernels.ops._modulation import NO_DOUBLE_BACKWARD
from vqkernels.ops._noise import as_word
from vqkernels.reference import attention as reference

# `attn_mask` is expanded to `[B, H, N, M]`. Also returns the softmax's logarithm `[B, H, N]`.
attend = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float scale,"
    " float dropout_p, Tensor? seed)"
    " -> (Tensor, Tensor)",
    reference.attention_with_lse,
)


@fake(attend)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return reference.like_queries(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=wide)


_attention_backward = define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? attn_mask, bool is_causal, float scale,"
    " float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    reference.attention_backward,
)


@fake(_attention_backward)
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


not_differentiable(_attention_backward, NO_DOUBLE_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, attn_mask, ctx.is_causal, ctx.scale, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, attn_mask, seed)


def _backward(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    q, k, v, out, lse, attn_mask, seed = ctx.saved_tensors
    backend = backend_of_gradients(ctx.backend, q)
    grads = _attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        attn_mask,
        ctx.is_causal,
        ctx.scale,
        ctx.dropout_p,
        seed,
        backend,
    )
    return *grads, *(None,) * 6


def backend_of_gradients(backend: str, q: Tensor) -> str:
    """What serves the gradients of a call to `backend`; "cuda" has a forward kernel only."""
    if backend != "cuda":
        return backend
    triton = why_not("triton", "attention", q.device.type, (q.dtype,)) is None
    return "triton" if triton else "reference"


differentiable(attend, _backward, _save)


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
    dropout_p: float = 0,
    seed: int | Tensor | None = None,
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
    dropout_p: float = 0,
    seed: int | Tensor | None = None,
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
    dropout_p: float = 0,  # not 0.0, which compiling with dynamic shapes makes a symbol
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of N queries to M keys.

    Args:
        q: `[B, H, N, d]`, floating point; strides are free, as in a view of a packed qkv.
        k, v: `[B, H, M, d]` and `[B, H, M, e]`; with `enable_gqa` their H may divide q's.
        attn_mask: broadcasts to `[B, H, N, M]`; bool (True = attend) or floating (added).
        is_causal: query i attends to keys 0..i; excludes `attn_mask`.
        scale: factor of the scores, 1 / sqrt(d) by default.
        return_lse: also return the logarithm of the softmax's denominator, which has no gradient.
        dropout_p: the share of weights that are dropped, rounded to a multiple of 1 / 65536; others
            are multiplied by 1 / (1 - dropout_p). `lse` is that of all weights.
        seed: an int (modulo 2^64), or an int64 tensor of one element, which decides with the
            numbers of sample, head, query and key which weights are dropped: give a new
            one each step. Goes with `dropout_p` above 0.

    Returns:
        `[B, H, N, e]` in q's dtype, or in autocast's as PyTorch's; with `return_lse` also
        `[B, H, N]` in fp32 (float64 for float64). A query without any key gives zeros and -inf.
        Gradients are deterministic; in half precision they are formed from the rounded output, as
        those of PyTorch's own kernels. That of an `attn_mask` that requires one is the
        reference's, whatever the backend.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ.
        ValueError: a shape or device that does not fit, or both `attn_mask` and `is_causal`; on a
            GPU more than 256 columns, unless the reference is asked for by name.
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
        check_mask(attn_mask, (*q.shape[:3], k.shape[2]), q)
        if is_causal:
            raise ValueError("attn_mask and is_causal exclude each other, got both")
    dropout_p, seed = checked_dropout(dropout_p, seed, q)
    q, k, v, attn_mask = autocast(q, k, v, attn_mask)
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return reference.attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            scale=scale,
            enable_gqa=enable_gqa,
            return_lse=return_lse,
            dropout_p=dropout_p,
            seed=seed,
        )
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    scale = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale)
    backend = select("attention", q, k, v)
    if seed is not None and backend == "cuda":
        backend = pass_over(backend, "attention", "its kernels have no dropout")
    out: tuple[Tensor, Tensor] = attend(
        q, k, v, attn_mask, is_causal, scale, dropout_p, seed, backend
    )
    return out if return_lse else out[0]


def checked_dropout(
    dropout_p: float, seed: int | Tensor | None, q: Tensor
) -> tuple[float, Tensor | None]:
    """The probability as kernels take it, and the seed where it is not 0."""
    if seed is None and dropout_p == 0:
        return 0.0, None
    below = round(dropout_p * 65536) if 0 <= dropout_p < 1 else 65536
    if below == 65536:
        raise ValueError(f"dropout_p must be in [0, 1), by 1 / 65536, got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError(f"dropout_p needs a seed, got {dropout_p} and None")
    if below == 0 or seed is None:
        return 0.0, None
    return below / 65536, as_word("seed", seed, q.device)


def autocast(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As autocast treats PyTorch's: everything but float64 and bool in its dtype."""
    device = q.device.type
    if q.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return q, k, v, attn_mask
    dtype = torch.get_autocast_dtype(device)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype), attn_mask


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    batch, heads, _, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k must be [{batch}, H, M, {dim}], got shape {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must be [{batch}, {k.shape[1]}, {k.shape[2]}, e], got shape {list(v.shape)}"
        )
    check_heads(heads, k.shape[1], enable_gqa)


def check_heads(heads: int, key_heads: int, enable_gqa: bool) -> None:
    if key_heads != heads and not enable_gqa:
        raise ValueError(f"k must have q's {heads} heads, got {key_heads} (see enable_gqa)")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"k's heads must divide q's {heads}, got {key_heads}")


def check_mask(attn_mask: Tensor, scores: tuple[int, ...], q: Tensor) -> None:
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
