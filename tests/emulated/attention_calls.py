"""The emulated CUDA launcher of attention on torch tensors of the CPU, and its check."""

from __future__ import annotations

import ctypes
import math

import torch
from cuda_calls import CudaCalls
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqkernels.reference.attention import like_queries, log_sum_exp

_DTYPES = {torch.float16: 1, torch.bfloat16: 2}


def attention(
    calls: CudaCalls,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`[B, H, N, d]` and `[B, H, N]`; k and v may have fewer heads."""
    batch, heads, queries, dim = q.shape
    key_heads, keys = k.shape[1:3]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    out = like_queries(q, dim).fill_(7)
    lse = torch.full((batch, heads, queries), 7.0)
    kind = 0
    given = [q, k, v]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, queries, keys)
        kind = 1 if attn_mask.dtype == torch.bool else 2
        given.append(attn_mask)
    for tensor in given:
        calls.declare(tensor, True)
    for tensor in (out, lse):
        calls.declare(tensor, False)
    function = calls.library.emulated_attention
    function.restype = ctypes.c_char_p
    message = function(
        *(_heads(tensor) for tensor in (q, k, v, out)),
        ctypes.c_void_p(lse.data_ptr()),
        None if attn_mask is None else _heads(attn_mask),
        kind,
        _DTYPES[q.dtype],
        (ctypes.c_int64 * 6)(batch, heads, key_heads, queries, keys, dim),
        ctypes.c_float(scale),
        int(is_causal),
    )
    if message is not None:
        raise RuntimeError(message.decode())
    return out, lse


def _heads(tensor: Tensor) -> ctypes.Array:
    return (ctypes.c_int64 * 5)(tensor.data_ptr(), *tensor.stride())


def check_attention(
    calls: CudaCalls,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Against float64: at most twice the largest error that PyTorch's formula has in q's dtype and
    one unit in the last place of the largest number. The logarithms within fp32's rounding of
    scores and sums."""
    out, lse = attention(calls, q, k, v, attn_mask, is_causal, scale)
    assert out.dtype == q.dtype
    exact = _eager(*(t.double() for t in (q, k, v)), attn_mask, is_causal, scale)
    low = _eager(q, k, v, attn_mask, is_causal, scale)
    assert out.isfinite().all()
    allowed = 2 * float((low.double() - exact).abs().max())
    allowed += torch.finfo(q.dtype).eps * float(exact.abs().max())
    error = float((out.double() - exact).abs().max())
    assert error <= allowed, f"out: {error:.3e} > {allowed:.3e}"

    wide = attn_mask.double() if attn_mask is not None and attn_mask.is_floating_point() else None
    expected = log_sum_exp(
        q.double(),
        k.double(),
        attn_mask=attn_mask if wide is None else wide,
        is_causal=is_causal,
        scale=scale,
    )
    unseen = expected == -torch.inf
    assert torch.equal(lse == -torch.inf, unseen)
    assert (out[unseen] == 0).all()
    seen = expected[~unseen]
    if seen.numel() > 0:
        error = float((lse[~unseen] - seen).abs().max())
        allowed = 2e-6 * (4 + float(seen.abs().max()))
        assert error <= allowed, f"lse: {error:.3e} > {allowed:.3e}"
    return out


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(q.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )
