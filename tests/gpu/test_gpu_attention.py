"""`attention` on a GPU, forward and backward, against float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from _helpers.data import generator
from _helpers.precision import assert_as_good_as_eager, forward_and_backward
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqkernels import attention
from vqkernels.backends import CUDA_ATTENTION_DIMS

DTYPES = [torch.bfloat16, torch.float16]
MASKS = ["none", "causal", "bool", "keys", "added", "heads"]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
dims = pytest.mark.parametrize("dim", CUDA_ATTENTION_DIMS)


def make(
    device: str,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    dim: int,
    *,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
) -> tuple[Tensor, ...]:
    draw = generator(queries + 7 * keys + 31 * dim)
    shapes = ((heads, queries, dim), *(((key_heads or heads), keys, dim),) * 2)
    return tuple(torch.randn(batch, *shape, generator=draw).to(device, dtype) for shape in shapes)


def arguments_of(mask: str, device: str, dtype: torch.dtype, queries: int, keys: int) -> Any:
    if mask in ("none", "causal"):
        return {"is_causal": mask == "causal"}
    shape = {"keys": (2, 1, 1, keys), "heads": (1, 2, 1, keys)}.get(mask, (queries, keys))
    draw = generator(5)
    allowed = torch.rand(shape, generator=draw) > 0.4
    if mask in ("bool", "added"):
        allowed[queries // 2] = False
    if mask in ("bool", "keys"):
        return {"attn_mask": allowed.to(device)}
    bias = 3 * torch.randn(shape, generator=draw)
    return {"attn_mask": bias.masked_fill(~allowed, -torch.inf).to(device, dtype)}


def eager(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        arguments["attn_mask"] = mask.to(q.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **arguments)


def check(tensors: tuple[Tensor, ...], **arguments: Any) -> None:
    """Results and gradients at most twice as far from float64 as PyTorch's formula, and one unit in
    the last place of the largest number. What is zero in truth, as dq with a single key, is a
    difference of numbers as large as other gradients."""
    grads = [torch.randn(tensors[0].shape, generator=generator(9)).to(tensors[0])]
    formula = functools.partial(eager, **arguments)
    ours = functools.partial(attention, enable_gqa=True, **arguments)
    found = forward_and_backward(ours, tensors, grads)
    low = forward_and_backward(formula, tensors, grads)
    wide = [t.double() for t in tensors]
    exact = forward_and_backward(formula, wide, [g.double() for g in grads])
    magnitudes = [float(t.detach().abs().max()) for t in exact]
    for name, mine, plain, true, largest in zip(
        ("out", "dq", "dk", "dv"), found, low, exact, magnitudes, strict=True
    ):
        assert mine.isfinite().all(), name
        allowed = 2 * float((plain.detach().double() - true.detach()).abs().max())
        allowed += torch.finfo(mine.dtype).eps * largest
        error = float((mine.detach().double() - true.detach()).abs().max())
        assert error <= max(allowed, 4e-6 * max(magnitudes)), f"{name}: {error:.3e}"


@dtypes
@dims
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_every_width(attention_backend, device, mask, dim, dtype):
    tensors = make(device, dtype, 150, 190, dim)
    check(tensors, **arguments_of(mask, device, dtype, 150, 190))


@dtypes
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 65), (65, 1), (127, 63), (128, 64), (129, 129), (1000, 77), (40, 3000)],
)
def test_sizes(attention_backend, device, queries, keys, dtype):
    for dim in (64, 72, 128):
        for causal in (False, True):
            check(make(device, dtype, queries, keys, dim), is_causal=causal)


@dtypes
def test_heads_that_share_keys(attention_backend, device, dtype):
    for heads, key_heads in ((4, 1), (4, 2), (6, 3)):
        tensors = make(device, dtype, 100, 140, 72, heads=heads, key_heads=key_heads)
        for causal in (False, True):
            check(tensors, is_causal=causal)


@dtypes
@dims
def test_outliers(attention_backend, device, dim, dtype):
    """One key whose score towers over all, first, in the middle and last."""
    for position in (0, 170, 299):
        q, k, v = make(device, dtype, 150, 300, dim)
        k[..., position, :] = (60 * q[..., 20, :].float() / math.sqrt(dim)).to(dtype)
        low, exact = eager(q, k, v), eager(*(t.double() for t in (q, k, v)))
        assert_as_good_as_eager(attention(q, k, v), low, exact)


@dtypes
def test_views_give_what_their_copies_give(attention_backend, device, dtype):
    packed = torch.randn(2, 300, 3, 4, 72, generator=generator(0)).to(device, dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out, lse = attention(q, k, v, return_lse=True)
    dense, dense_lse = attention(*(t.contiguous() for t in (q, k, v)), return_lse=True)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, dense)
    assert torch.equal(lse, dense_lse)
    odd = packed.flatten()[1 : 1 + 2 * 4 * 50 * 72].view(2, 4, 50, 72)  # not on 16 bytes
    assert torch.equal(attention(odd, odd, odd), attention(*(odd.clone() for _ in range(3))))


@dtypes
def test_logarithm_of_the_denominator(attention_backend, device, dtype):
    q, k, v = make(device, dtype, 150, 190, 64)
    mask = arguments_of("bool", device, dtype, 150, 190)["attn_mask"]
    _, lse = attention(q, k, v, attn_mask=mask, return_lse=True)
    scores = (q.double() @ k.double().mT / 8).masked_fill(~mask, -torch.inf)
    expected = scores.logsumexp(-1)
    seen = expected > -torch.inf
    assert torch.equal(lse == -torch.inf, ~seen)
    # The CPU's bf16 kernel sums weights as the product with v sees them, rounded.
    rounded = device == "cpu" and dtype == torch.bfloat16
    bound = torch.finfo(dtype).eps if rounded else 4e-6
    torch.testing.assert_close(lse[seen].double(), expected[seen], rtol=bound, atol=bound)


def test_same_bits_on_every_run(attention_backend, device):
    tensors = make(device, torch.bfloat16, 1000, 1000, 72)
    first = attention(*tensors, return_lse=True)
    for _ in range(3):
        again = attention(*tensors, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_empty(attention_backend, device):
    for queries, keys in ((0, 9), (9, 0)):
        q, k, v = make(device, torch.bfloat16, queries, keys, 64)
        out, lse = attention(q, k, v, return_lse=True)
        assert out.shape == q.shape
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
