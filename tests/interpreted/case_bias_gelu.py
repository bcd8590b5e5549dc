"""`bias_gelu` and its gradients, and `timestep_embedding`, against float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from _helpers.precision import forward_and_backward, judge
from torch import Tensor
from torch.nn import functional as F

from vqkernels.triton import bias_gelu_backward, timestep_embedding
from vqkernels.triton.modulation_configs import select_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["tanh", "none"]


def ours(approximate: str) -> Callable[..., Tensor]:
    return lambda x, bias=None: torch.ops.vqkernels.bias_gelu(x, bias, approximate, "triton")


def eager(approximate: str) -> Callable[..., Tensor]:
    def function(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.gelu(x if bias is None else x + bias, approximate=approximate)

    return function


def gelu64(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Values and slopes in float64, from the formulas."""
    u = x.double()
    if approximate == "tanh":
        t = (math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)).tanh()
        inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * u**2)
        return u / 2 * (1 + t), (1 + t) / 2 + u / 2 * (1 - t**2) * inner
    phi = torch.special.ndtr(u)
    return u * phi, phi + u * (-u * u / 2).exp() / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 1), (2, 3, 33), (0, 4), (37, 70), (9, 1300)])
@pytest.mark.parametrize("approximate", FORMS)
def test_against_eager(approximate, shape, dtype):
    x, grad = (torch.randn(shape) * 2).to(dtype), torch.randn(shape).to(dtype)
    bias = torch.randn(shape[-1]).to(dtype)
    if x.numel() == 0:
        found = forward_and_backward(ours(approximate), (x, bias), [grad])
        assert (found[2] == 0).all()
        return
    judge(ours(approximate), eager(approximate), (x,), [grad])
    judge(ours(approximate), eager(approximate), (x, bias), [grad])


@pytest.mark.parametrize("approximate", FORMS)
def test_every_magnitude_in_fp32(approximate):
    """Values within 2e-7 of |u| and slopes within 1e-6, from 1e-30 to the ends."""
    sizes = torch.cat([torch.logspace(-30, 30, 8001), torch.linspace(0, 16, 24001)])
    x = torch.cat([sizes, -sizes]).view(2, -1)
    value, slope = forward_and_backward(ours(approximate), (x,), [torch.ones_like(x)])
    exact_value, exact_slope = gelu64(x.clamp(-20, 20), approximate)
    exact_value = torch.where(x.abs() > 20, x.double().clamp(min=0), exact_value)
    assert ((value.double() - exact_value).abs() <= 2e-7 * x.double().abs() + 1e-27).all()
    assert (slope.double() - exact_slope).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", FORMS)
def test_infinities_and_nan(approximate, dtype):
    big = torch.finfo(dtype).max
    row = torch.tensor([torch.inf, -torch.inf, torch.nan, big, -big, 0.0, -0.0, 1.0])
    x = row.repeat(3, 5).to(dtype)
    for bias in (None, torch.zeros(40, dtype=dtype)):
        inputs = (x,) if bias is None else (x, bias)
        value, grad_x, *_ = forward_and_backward(ours(approximate), inputs, [torch.ones_like(x)])
        v, g = value[0, :8], grad_x[0, :8]
        assert v[0] == torch.inf
        assert v[3] == big
        assert v[[1, 4]].abs().max() <= 1e-26
        assert v[[5, 6]].abs().max() == 0
        assert v[2].isnan()
        assert g[2].isnan()
        limits = torch.tensor([1.0, 0, 1, 0, 0.5])
        assert (g[[0, 1, 3, 4, 5]].float() - limits).abs().max() <= 1e-26


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_bias_of_another_dtype(half):
    x, grad, bias = torch.randn(20, 33).to(half), torch.randn(20, 33).to(half), torch.randn(33)
    out, grad_x, grad_bias = forward_and_backward(ours("tanh"), (x, bias), [grad])
    assert (out.dtype, grad_x.dtype, grad_bias.dtype) == (half, half, torch.float32)
    value, slope = gelu64(x.double() + bias.double(), "tanh")
    eps = torch.finfo(half).eps
    assert ((out.double() - value).abs() <= 0.6 * eps * value.abs() + 1e-4 * eps).all()
    exact = (grad.double() * slope).sum(0)
    assert (grad_bias.double() - exact).abs().max() <= 1e-5 * exact.abs().max() + 1e-6


def test_many_chunks():
    x, grad, bias = torch.randn(1100, 24), torch.randn(1100, 24), torch.randn(24)
    config = dataclasses.replace(
        select_rows("gelu backward", 24), rows=2, chunk=8, programs=0, block=16
    )
    grad_x, grad_bias = bias_gelu_backward(grad, x, bias, "none", config=config)
    _, slope = gelu64(x.double() + bias.double(), "none")
    torch.testing.assert_close(grad_x.double(), grad * slope, rtol=0, atol=4e-6)
    torch.testing.assert_close(grad_bias.double(), (grad * slope).sum(0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_give_what_their_copies_give(dtype):
    wide = torch.randn(4, 9, 80).to(dtype)
    bias = torch.randn(80).to(dtype)[::2]
    for x in (wide[..., :40], wide[..., ::2], wide[:, :1, :40].expand(-1, 9, -1)):
        grad = wide[..., 40:]
        found = forward_and_backward(ours("none"), (x, bias), [grad])
        copies = (x.contiguous(), bias.contiguous())
        expected = forward_and_backward(ours("none"), copies, [grad.contiguous()])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert found[0].is_contiguous()


def formula(t: Tensor, dim: int, max_period: float) -> Tensor:
    half = dim // 2
    angles = t.double()[:, None] * max_period ** (-torch.arange(half).double() / max(half, 1))
    zeros = torch.zeros(len(t), dim % 2, dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin(), zeros], 1)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 16, 33, 256, 257, 600])
@pytest.mark.parametrize("max_period", [10000.0, 2.0, 1.0, 1e6, 0.5])
def test_timesteps(dim, max_period):
    t = torch.cat([torch.rand(5) * 1000, torch.tensor([0.0, 0.5, -3.5, 999.0, 1e4, -1e4])])
    embedding = timestep_embedding(t, dim, max_period)
    assert embedding.dtype == torch.float32
    assert embedding.shape == (len(t), dim)
    limit = 2e-6 if max_period >= 1 else 4e-6
    assert (embedding.double() - formula(t, dim, max_period)).abs().max() <= limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_timesteps_in_half_precision(dtype):
    t = (torch.rand(20) * 100).to(dtype)
    assert (timestep_embedding(t, 10, 1e4).double() - formula(t, 10, 1e4)).abs().max() <= 2e-7


def test_timesteps_of_any_stride_and_size():
    assert timestep_embedding(torch.zeros(0), 8, 1e4).shape == (0, 8)
    t = torch.rand(30) * 50
    strided = timestep_embedding(t[::3], 8, 1e4)
    assert torch.equal(strided, timestep_embedding(t[::3].clone(), 8, 1e4))
    one = timestep_embedding(torch.tensor(2.5).expand(4), 8, 1e4)
    assert torch.equal(one, timestep_embedding(torch.full((4,), 2.5), 8, 1e4))
    huge = timestep_embedding(torch.tensor([1.0, math.nan, math.inf, 2.0, 3e38, 1e12]), 6, 1e4)
    assert huge[1:3].isnan().all()
    assert (huge[[0, 3, 4, 5]].abs() <= 1).all()
