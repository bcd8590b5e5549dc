"""Self-attention on q, k and v side by side, as one projection leaves them.

The kernels are those of `attention`, on views. What differs is the gradient, which is written side
by side too, so that the projection's backward takes it as it is.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from vqkernels.backends import pass_over, select
from vqkernels.ops._checks import check_floating
from vqkernels.ops._library import define, define_as, differentiable, fake, not_differentiable
from vqkernels.ops._modulation import NO_DOUBLE_BACKWARD
from vqkernels.ops.attention import (
    attend,
    attention,
    autocast,
    backend_of_gradients,
    check_mask,
    checked_dropout,
)
from vqkernels.reference import attention_qkvpacked as reference


def _attend(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = attend(*reference.heads_of(qkv), *arguments)
    return out.transpose(1, 2).contiguous(), lse


# `attn_mask` is expanded to `[B, H, N, N]`. Also returns the softmax's logarithm `[B, H, N]`.
_attention_qkvpacked = define_as(
    "attention_qkvpacked(Tensor qkv, Tensor? attn_mask, bool is_causal, float scale,"
    " float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
    _attend,
)


@fake(_attention_qkvpacked)
def _(
    qkv: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, dim = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    out = qkv.new_empty(batch, tokens, heads, dim)
    return out, qkv.new_empty(batch, heads, tokens, dtype=wide)


_attention_qkvpacked_backward = define(
    "attention_qkvpacked_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse,"
    " Tensor? attn_mask, bool is_causal, float scale, float dropout_p, Tensor? seed) -> Tensor",
    reference.attention_qkvpacked_backward,
)


@fake(_attention_qkvpacked_backward)
def _(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


not_differentiable(_attention_qkvpacked_backward, NO_DOUBLE_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, attn_mask, ctx.is_causal, ctx.scale, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, attn_mask, seed)


def _backward(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    qkv, out, lse, attn_mask, seed = ctx.saved_tensors
    backend = backend_of_gradients(ctx.backend, qkv)
    choices = (attn_mask, ctx.is_causal, ctx.scale, ctx.dropout_p, seed, backend)
    return _attention_qkvpacked_backward(grad, qkv, out, lse, *choices), *(None,) * 6


differentiable(_attention_qkvpacked, _backward, _save)


@overload
def attention_qkvpacked(
    qkv: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    dropout_p: float = 0,
    seed: int | Tensor | None = None,
) -> Tensor: ...


@overload
def attention_qkvpacked(
    qkv: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: Literal[True],
    dropout_p: float = 0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention_qkvpacked(
    qkv: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    dropout_p: float = 0,
    seed: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of N tokens to each other.

    Args:
        qkv: `[B, N, 3, H, d]`, floating point, such as `linear(x).view(B, N, 3, H, d)`.
        attn_mask, is_causal, scale, return_lse, dropout_p, seed: as in `attention`; the mask
            broadcasts to `[B, H, N, N]`.

    Returns:
        `[B, N, H, d]`, contiguous, in qkv's dtype or in autocast's; with `return_lse` also
        `[B, H, N]` as from `attention`. Gradients are deterministic.

    Raises:
        TypeError: qkv is not floating point, or a mask of another dtype.
        ValueError: a shape or device that does not fit, or both `attn_mask` and `is_causal`.
    """
    check_floating("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, N, 3, H, d], got shape {list(qkv.shape)}")
    if qkv.shape[3] == 0:
        raise ValueError(f"qkv must hold at least one head, got shape {list(qkv.shape)}")
    q, k, v = reference.heads_of(qkv)
    if attn_mask is not None:
        check_mask(attn_mask, (*q.shape[:3], k.shape[2]), q)
        if is_causal:
            raise ValueError("attn_mask and is_causal exclude each other, got both")
        if attn_mask.requires_grad and torch.is_grad_enabled():
            out, lse = attention(
                q,
                k,
                v,
                attn_mask=attn_mask,
                scale=scale,
                return_lse=True,
                dropout_p=dropout_p,
                seed=seed,
            )
            out = out.transpose(1, 2).contiguous()
            return (out, lse) if return_lse else out
    dropout_p, seed = checked_dropout(dropout_p, seed, qkv)
    qkv, _, _, attn_mask = autocast(qkv, qkv, qkv, attn_mask)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    scale = 1 / math.sqrt(max(1, qkv.shape[-1])) if scale is None else float(scale)
    backend = select("attention", *reference.heads_of(qkv))
    if seed is not None and backend == "cuda":
        backend = pass_over(backend, "attention", "its kernels have no dropout")
    result: tuple[Tensor, Tensor] = _attention_qkvpacked(
        qkv, attn_mask, is_causal, scale, dropout_p, seed, backend
    )
    return result if return_lse else result[0]
