"""`bias_gelu`, forward and backward, against plain PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from _helpers.precision import forward_and_backward, judge
from torch import Tensor
from torch.nn import functional as F

import vqkernels
from vqkernels import bias_gelu

every_capability = pytest.mark.every_capability
pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["tanh", "none"]
SHAPES = [(1,), (5,), (3, 1), (2, 3, 33), (130, 70), (67, 384)]


def ours(approximate: str) -> Callable[..., Tensor]:
    return lambda x, bias=None: bias_gelu(x, bias, approximate=approximate)


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


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("approximate", FORMS)
def test_against_eager(
    backend: str, approximate: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, grad = (torch.randn(shape) * 2).to(dtype), torch.randn(shape).to(dtype)
    bias = torch.randn(shape[-1]).to(dtype)
    judge(ours(approximate), eager(approximate), (x,), [grad])
    judge(ours(approximate), eager(approximate), (x, bias), [grad])


@every_capability
@pytest.mark.parametrize("approximate", FORMS)
def test_every_magnitude_in_fp32(native_cpu: None, approximate: str) -> None:
    """Values within 2e-7 of |u| and slopes within 1e-6, from 1e-30 to the ends."""
    sizes = torch.cat([torch.logspace(-30, 30, 20001), torch.linspace(0, 16, 60001)])
    x = torch.cat([sizes, -sizes]).view(2, -1)
    value, slope = forward_and_backward(ours(approximate), (x,), [torch.ones_like(x)])
    exact_value, exact_slope = gelu64(x.clamp(-20, 20), approximate)
    exact_value = torch.where(x.abs() > 20, x.double().clamp(min=0), exact_value)
    assert ((value.double() - exact_value).abs() <= 2e-7 * x.double().abs() + 1e-27).all()
    assert (slope.double() - exact_slope).abs().max() <= 1e-6


@every_capability
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_number(native_cpu: None, dtype: torch.dtype, approximate: str) -> None:
    """All of them: beside the rounding to the format, fp32's errors, or 2^-12 for bf16."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    x = x[x.isfinite()].view(1, -1)
    value, slope = forward_and_backward(ours(approximate), (x,), [torch.ones_like(x)])
    exact_value, exact_slope = gelu64(x.double().clamp(-20, 20), approximate)
    exact_value = torch.where(x.abs() > 20, x.double().clamp(min=0), exact_value)
    inside = 2.0**-12 if dtype == torch.bfloat16 else 1e-6
    half_ulp = torch.finfo(dtype).eps / 2
    for mine, exact, size in (
        (value, exact_value, x.double().abs().clamp(max=20)),
        (slope, exact_slope, torch.ones_like(exact_slope)),
    ):
        allowed = half_ulp * exact.abs() + inside * torch.minimum(size, exact.abs() + 0.1)
        assert ((mine.double() - exact).abs() <= allowed + torch.finfo(dtype).smallest_normal).all()


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", FORMS)
def test_infinities_and_nan(backend: str, approximate: str, dtype: torch.dtype) -> None:
    big = torch.finfo(dtype).max
    row = torch.tensor([torch.inf, -torch.inf, torch.nan, big, -big, 0.0, -0.0, 1.0])
    x = row.repeat(3, 5).to(dtype)
    for bias in (None, torch.zeros(40, dtype=dtype)):
        inputs = (x,) if bias is None else (x, bias)
        value, grad_x, *_ = forward_and_backward(ours(approximate), inputs, [torch.ones_like(x)])
        for start in range(0, 40, 8):
            v, g = value[0, start : start + 8], grad_x[0, start : start + 8]
            assert v[0] == torch.inf
            assert v[3] == big
            assert v[[1, 4]].abs().max() <= 1e-26
            assert v[[5, 6]].abs().max() == 0
            assert v[2].isnan()
            assert g[2].isnan()
            limits = torch.tensor([1.0, 0, 1, 0, 0.5])
            assert (g[[0, 1, 3, 4, 5]].float() - limits).abs().max() <= 1e-26


@every_capability
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_bias_of_another_dtype(backend: str, half: torch.dtype) -> None:
    x, grad = torch.randn(70, 33).to(half), torch.randn(70, 33).to(half)
    bias = torch.randn(33)
    out, grad_x, grad_bias = forward_and_backward(ours("tanh"), (x, bias), [grad])
    assert (out.dtype, grad_x.dtype, grad_bias.dtype) == (half, half, torch.float32)
    value, slope = gelu64(x.double() + bias.double(), "tanh")
    eps = torch.finfo(half).eps
    assert ((out.double() - value).abs() <= 0.6 * eps * value.abs() + 1e-4 * eps).all()
    exact = (grad.double() * slope).sum(0)
    assert (grad_bias.double() - exact).abs().max() <= 1e-4 * exact.abs().max() + 1e-5


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_give_what_their_copies_give(native_cpu: None, dtype: torch.dtype) -> None:
    wide = torch.randn(4, 9, 80).to(dtype)
    bias = torch.randn(80).to(dtype)[::2]
    for x in (wide[..., :40], wide[..., ::2], wide[:, :1, :40].expand(-1, 9, -1)):
        grad = wide[..., 40:]
        found = forward_and_backward(ours("none"), (x, bias), [grad])
        copies = (x.contiguous(), bias.contiguous())
        expected = forward_and_backward(ours("none"), copies, [grad.contiguous()])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert found[0].is_contiguous()


@every_capability
def test_same_bits_at_any_number_of_threads(native_cpu: None, restored_threads: None) -> None:
    x, grad, bias = torch.randn(700, 300), torch.randn(700, 300), torch.randn(300)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(forward_and_backward(ours("tanh"), (x, bias), [grad]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_capability
@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), (2, 0, 8)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    x, bias = torch.randn(shape), torch.randn(shape[-1])
    out, grad_x, grad_bias = forward_and_backward(ours("tanh"), (x, bias), [x])
    assert out.shape == grad_x.shape == shape
    assert grad_bias.shape == bias.shape
    assert (grad_bias == 0).all()


def test_float64_goes_to_the_reference() -> None:
    x, bias = torch.randn(3, 8).double(), torch.randn(8).double()
    assert vqkernels.explain("bias_gelu", x, bias).backend == "reference"
    assert torch.autograd.gradcheck(ours("tanh"), (x.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_dtypes_alone(backend: str, dtype: torch.dtype) -> None:
    for given in (torch.float32, dtype):
        x, bias = torch.randn(5, 16).to(given), torch.randn(16)
        plain = bias_gelu(x, bias)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(bias_gelu(x, bias), plain)
        assert plain.dtype == given


def test_no_second_derivative(backend: str) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(bias_gelu(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()
