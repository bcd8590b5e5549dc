"""CUDA `attention`, the source that nvcc compiles, on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from attention_calls import attention, check_attention
from attention_cases import DIMS, make, mask_of, packed
from cases import Case, cases
from cuda_calls import CudaCalls
from emulator import Emulator

FP16, BF16 = torch.float16, torch.bfloat16
ATTENTION = [case for case in cases() if case.name.startswith("attention")]
MASKS = ("none", "causal", "bool", "keys", "added", "heads")
dtypes = pytest.mark.parametrize("dtype", [FP16, BF16])
dims = pytest.mark.parametrize("dim", DIMS)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_in_every_order(kernels: Emulator, case: Case, order: str) -> None:
    kernels.set_order(order, seed=3)
    case.run(CudaCalls(kernels.library, kernels.declare, case.device))


@dtypes
@dims
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_every_width(plain: CudaCalls, mask: str, dim: int, dtype: torch.dtype) -> None:
    tensors = make(45, 77, dim, dtype, batch=2, heads=2)
    if mask in ("none", "causal"):
        check_attention(plain, *tensors, is_causal=mask == "causal")
    else:
        check_attention(plain, *tensors, attn_mask=mask_of(mask, 45, 77, dtype))


@dims
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 65), (65, 1), (127, 63), (128, 64), (129, 129), (16, 300)]
)
def test_sizes(plain: CudaCalls, queries: int, keys: int, dim: int) -> None:
    """Queries and keys that fill tiles, and those that leave one over or are one short."""
    for causal in (False, True):
        check_attention(plain, *make(queries, keys, dim, BF16), is_causal=causal)


@dtypes
@pytest.mark.parametrize("mask", ["none", "causal", "keys"])
def test_heads_that_share_keys(plain: CudaCalls, mask: str, dtype: torch.dtype) -> None:
    for heads, key_heads in ((4, 1), (4, 2), (3, 3)):
        tensors = make(20, 70, 72, dtype, batch=2, heads=heads, key_heads=key_heads)
        hidden = mask_of("keys", 20, 70, dtype) if mask == "keys" else None
        check_attention(plain, *tensors, attn_mask=hidden, is_causal=mask == "causal")


@dtypes
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.7])
def test_scales(plain: CudaCalls, scale: float, dtype: torch.dtype) -> None:
    for causal in (False, True):
        check_attention(plain, *make(40, 90, 64, dtype), is_causal=causal, scale=scale)
    tensors = make(40, 90, 64, dtype)
    check_attention(plain, *tensors, attn_mask=mask_of("added", 40, 90, dtype), scale=scale)


@dtypes
@dims
def test_outliers(plain: CudaCalls, dim: int, dtype: torch.dtype) -> None:
    """One key whose score towers over all, first, in the middle and last; and one far below."""
    for position in (0, 70, 149):
        for size in (60.0, -60.0):
            q, k, v = make(33, 150, dim, dtype)
            k[..., position, :] = (size * q[..., 20, :].float() / math.sqrt(dim)).to(dtype)
            out = check_attention(plain, q, k, v)
            if size > 0:
                torch.testing.assert_close(out[..., 20, :], v[..., position, :])


@dtypes
def test_finfo_min_in_a_mask(plain: CudaCalls, dtype: torch.dtype) -> None:
    """Keys that are hidden by the least number are as good as hidden; a row of it is a mean."""
    q, k, v = make(20, 70, 64, dtype)
    least = torch.finfo(dtype).min
    bias = torch.zeros(20, 70, dtype=dtype)
    bias[:, 30:] = least
    bias[3] = least
    out, lse = attention(plain, q, k, v, bias)
    expected = (
        torch.softmax((q.double() @ k.double().mT / 8)[..., :30], -1) @ v.double()[..., :30, :]
    )
    others = [i for i in range(20) if i != 3]
    eps = torch.finfo(dtype).eps
    assert (out.double() - expected)[..., others, :].abs().max() < 2 * eps
    if dtype == BF16:  # bfloat16's least number swallows scores; the row is their mean
        mean = v.double().mean(-2)
        assert (out[..., 3, :].double() - mean).abs().max() < 2 * eps
    assert lse.isfinite().all()


@dtypes
def test_rows_do_not_meet(plain: CudaCalls, dtype: torch.dtype) -> None:
    """A query that is not a number spoils its own row alone; hidden keys may be anything finite."""
    q, k, v = make(40, 70, 80, dtype)
    clean, _ = attention(plain, q, k, v)
    q[..., 17, 3] = torch.nan
    out, lse = attention(plain, q, k, v)
    assert out[..., 17, :].isnan().all()
    assert lse[..., 17].isnan().all()
    others = [i for i in range(40) if i != 17]
    assert torch.equal(out[..., others, :], clean[..., others, :])


@dtypes
def test_views_are_read_in_place(plain: CudaCalls, dtype: torch.dtype) -> None:
    q, k, v = packed(70, 72, dtype)
    out = check_attention(plain, q, k, v)
    assert out.stride() == (70 * 2 * 72, 72, 2 * 72, 1)  # heads beside each other, as q's
    dense, _ = attention(plain, *(t.contiguous() for t in (q, k, v)))
    assert torch.equal(out, dense)
    expanded = k[:, :1].expand(-1, 2, -1, -1)
    assert torch.equal(
        attention(plain, q, expanded, v)[0], attention(plain, q, expanded.contiguous(), v)[0]
    )


def test_rows_far_apart(plain: CudaCalls) -> None:
    """The third row lies 2^31 elements behind the first; only three pages of it are touched."""
    rows, stride = 3, (1 << 30) + 8
    memory = torch.empty((rows - 1) * stride + 64, dtype=BF16)
    q, k, v = make(5, rows, 64, BF16)
    far = memory.as_strided(k.shape, (0, 0, stride, 1)).copy_(k)
    assert torch.equal(attention(plain, q, far, v)[0], attention(plain, q, k, v)[0])


def test_empty(plain: CudaCalls) -> None:
    for shape in ((0, 2, 5), (2, 0, 5), (2, 2, 0)):
        q = torch.ones(*shape, 64, dtype=BF16)
        k = torch.ones(shape[0], max(shape[1], 1), 9, 64, dtype=BF16)
        out, lse = attention(plain, q, k, k)
        assert out.shape == q.shape
        assert lse.shape == shape


def test_widths_without_a_kernel_are_refused(plain: CudaCalls) -> None:
    with pytest.raises(RuntimeError, match="64, 72, 80, 96 or 128 columns, got 88"):
        attention(plain, *make(4, 4, 88, BF16))


def test_the_order_of_threads_changes_no_bit(kernels: Emulator) -> None:
    tensors = make(60, 100, 72, BF16)
    calls = CudaCalls(kernels.library, kernels.declare)
    results = []
    for order in ("forward", "reverse", "shuffled"):
        kernels.set_order(order, seed=5)
        results.append(attention(calls, *tensors))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
