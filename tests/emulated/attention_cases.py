"""Small calls that together take every path of the CUDA attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _helpers import data
from attention_calls import attention, check_attention
from cuda_calls import CudaCalls
from torch import Tensor

FP16, BF16 = torch.float16, torch.bfloat16
DIMS = (64, 72, 80, 96, 128)


def make(
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: int = 1,
    key_heads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = data.generator(queries + 7 * keys + 31 * dim)
    shapes = ((heads, queries, dim), *(((key_heads or heads), keys, dim),) * 2)
    q, k, v = (torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def packed(
    tokens: int, dim: int, dtype: torch.dtype, *, batch: int = 2, heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one `[B, N, 3, H, d]`."""
    qkv = torch.randn(batch, tokens, 3, heads, dim, generator=data.generator(tokens)).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q, k, v


def mask_of(kind: str, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """ "bool" and "added" of every query, one of which sees nothing; "keys" of each of two batches;
    "heads", added, of each of two heads."""
    generator = data.generator(5)
    shape = {"keys": (2, 1, 1, keys), "heads": (1, 2, 1, keys)}.get(kind, (queries, keys))
    allowed = torch.rand(shape, generator=generator) > 0.4
    if kind in ("bool", "added"):
        allowed[queries // 2] = False
    if kind in ("bool", "keys"):
        return allowed
    bias = 3 * torch.randn(shape, generator=generator)
    return bias.masked_fill(~allowed, -torch.inf).to(dtype)


def plain(calls: CudaCalls) -> None:
    check_attention(calls, *make(70, 150, 64, BF16))


def eight_columns_more(calls: CudaCalls) -> None:
    check_attention(calls, *make(40, 100, 72, FP16))


def small_tiles(calls: CudaCalls) -> None:
    check_attention(calls, *make(33, 140, 128, BF16))


def causal(calls: CudaCalls) -> None:
    check_attention(calls, *make(150, 170, 64, FP16), is_causal=True)


def boolean(calls: CudaCalls) -> None:
    mask = mask_of("bool", 35, 75, BF16)
    check_attention(calls, *make(35, 75, 80, BF16), attn_mask=mask)


def added(calls: CudaCalls) -> None:
    """Stored with columns apart."""
    mask = mask_of("added", 20, 75, FP16).t().contiguous().t()
    check_attention(calls, *make(20, 75, 72, FP16), attn_mask=mask)


def of_batches(calls: CudaCalls) -> None:
    """Views of a packed qkv, keys hidden by batch."""
    check_attention(calls, *packed(40, 64, BF16), attn_mask=mask_of("keys", 40, 40, BF16))


def shared_keys(calls: CudaCalls) -> None:
    check_attention(calls, *make(20, 40, 96, FP16, heads=4, key_heads=2))


def of_heads(calls: CudaCalls) -> None:
    mask = mask_of("heads", 5, 40, BF16)
    check_attention(calls, *make(5, 40, 96, BF16, batch=2, heads=2), attn_mask=mask)


def no_keys(calls: CudaCalls) -> None:
    out, lse = attention(calls, *make(20, 0, 64, BF16))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


RUNS: dict[str, Callable[[CudaCalls], None]] = {
    "plain": plain,
    "eight-columns-more": eight_columns_more,
    "small-tiles": small_tiles,
    "causal": causal,
    "boolean": boolean,
    "added": added,
    "of-batches": of_batches,
    "shared-keys": shared_keys,
    "of-heads": of_heads,
    "no-keys": no_keys,
}
