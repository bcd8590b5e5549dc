from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels.reference.normal_noise import philox4x32

# The last word of a counter: "attn".
DROPOUT_STREAM = 0x6174746E


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
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if dropout_p > 0:
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        weights, lse = _weights(q, k, attn_mask, is_causal, scale)
        weights = weights * dropout_factors(weights, dropout_p, seed)
        values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).to(weights.dtype)
        out = (weights @ values).to(q.dtype)
        wide = torch.promote_types(q.dtype, torch.float32)
        return (out, lse.to(wide)) if return_lse else out
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if not return_lse:
        return out
    return out, log_sum_exp(q, k, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Logarithm of the softmax's denominator, fp32 (float64 for float64) `[B, H, N]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, H, M, d]
    scores = q.to(wide) @ keys.to(wide).mT * scale  # [B, H, N, M]
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(wide)
    return scores.logsumexp(-1)


def like_queries(q: Tensor, columns: int) -> Tensor:
    """A new `[B, H, N, columns]`, with heads beside each other in memory where q has them so."""
    batch, heads, queries, _ = q.shape
    if q.stride(1) >= q.stride(2):
        return q.new_empty(batch, heads, queries, columns)
    return q.new_empty(batch, queries, heads, columns).transpose(1, 2)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    first_head: int = 0,
) -> tuple[Tensor, Tensor]:
    weights, lse = _weights(q, k, attn_mask, is_causal, scale)  # [B, H, N, M], [B, H, N]
    weights = weights * dropout_factors(weights, dropout_p, seed, first_head)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).to(weights.dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    return like_queries(q, v.shape[-1]).copy_(weights @ values), lse.to(wide)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    first_head: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    weights, _ = _weights(q, k, attn_mask, is_causal, scale)
    factors = dropout_factors(weights, dropout_p, seed, first_head)
    group = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1).to(weights.dtype) for t in (k, v))
    grad, queries = (t.to(weights.dtype) for t in (grad, q))

    def per_key_head(t: Tensor) -> Tensor:
        return t.unflatten(1, (k.shape[1], group)).sum(2)

    dv = per_key_head((weights * factors).mT @ grad)
    slopes = grad @ values.mT * factors  # [B, H, N, M]
    # In truth the sum of grad * out, but out has been rounded.
    delta = (weights * slopes).sum(-1, keepdim=True)
    scores = weights * (slopes - delta) * scale  # the gradient of q.k
    dq, dk = scores @ keys, per_key_head(scores.mT @ queries)
    results = ((q, dq), (k, dk), (v, dv))
    return tuple(torch.empty_like(like).copy_(value) for like, value in results)  # type: ignore[return-value]


def dropout_factors(
    weights: Tensor, dropout_p: float, seed: Tensor | None, first_head: int = 0
) -> Tensor:
    """Of each weight `[B, H, N, M]` 0 where it is dropped, else 1 / (1 - dropout_p).

    Counter (key / 8, query, head of all heads, stream) has four words, of two keys each."""
    if seed is None:
        return weights.new_ones(())
    batch, heads, queries, keys = weights.shape
    count = lambda n: torch.arange(n, device=weights.device)  # noqa: E731
    head = first_head + count(batch * heads).view(batch, heads, 1, 1)
    stream = torch.full((), DROPOUT_STREAM, device=weights.device)
    counter = (count((keys + 7) // 8), count(queries)[:, None], head, stream)
    words = philox4x32(torch.broadcast_tensors(*counter), (seed, seed >> 32))
    halves = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
    numbers = torch.stack(halves, -1).flatten(-2)[..., :keys]  # [B, H, N, M]
    below = round(dropout_p * 65536)
    return (numbers >= below).to(weights.dtype) / (1 - below / 65536)


def _weights(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights and lse in float64; zeros and -inf for a query without a key."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).double()
    scores = q.double() @ keys.mT * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(unseen, 0.0).softmax(-1).masked_fill(unseen, 0.0)
    return weights, scores.logsumexp(-1)
