from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreter import bf16_to_fp32, fp32_to_bf16


def test_conversions_match_torch():
    values = torch.cat(
        [
            torch.randn(4000) * torch.logspace(-42, 38, 4000),
            torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.00390625, 3.4e38]),
        ]
    )
    expected = values.bfloat16()
    words = fp32_to_bf16(values.numpy())
    assert np.array_equal(words, expected.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(bf16_to_fp32(words), expected.float().numpy())
    assert np.isnan(bf16_to_fp32(fp32_to_bf16(np.array([np.nan], np.float32)))).all()


@triton.jit
def _dot_and_round(a, b, product, rounded, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    result = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(product + at, result)
    tl.store(rounded + at, result)


def test_dot_and_store_in_bf16():
    a, b = torch.randn(2, 32, 32).bfloat16()
    product = torch.empty(32, 32)
    rounded = torch.empty(32, 32, dtype=torch.bfloat16)
    _dot_and_round[(1,)](a, b, product, rounded, N=32)
    torch.testing.assert_close(product, a.float() @ b.float())
    assert torch.equal(rounded, product.bfloat16())


@triton.jit
def _copy(source, result, count, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(result + i, tl.load(source + i), mask=i < count)


@triton.jit
def _count(result, count, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(result + i, 1, mask=i < count)


def test_guard_sees_what_is_out_of_bounds():
    whole = torch.arange(16.0)
    _copy[(1,)](whole, torch.empty(16), 16, N=16)
    with pytest.raises(Exception, match="1 accesses outside"):
        _copy[(1,)](whole[:15], torch.empty(16), 16, N=16)
    with pytest.raises(Exception, match="3 accesses outside"):
        _copy[(1,)](whole, torch.empty(13), 16, N=16)
    _copy[(1,)](whole, torch.empty(13), 13, N=16)
    with pytest.raises(Exception, match="2 accesses outside"):
        _count[(1,)](torch.zeros(14, dtype=torch.int32), 16, N=16)


@triton.jit
def _smaller(a, b, result, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(result + i, tl.minimum(tl.load(a + i), tl.load(b + i)))


def test_minimum_leaves_out_a_nan():
    nan = float("nan")
    a, b = torch.tensor([1.0, nan, 2.0, nan]), torch.tensor([3.0, 4.0, nan, nan])
    result = torch.empty(4)
    _smaller[(1,)](a, b, result, N=4)
    assert result[:3].tolist() == [1.0, 4.0, 2.0]
    assert result[3].isnan()
