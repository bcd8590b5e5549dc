"""Attention on a packed projection: the bits of `attention` on its views, and a packed gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vqkernels import attention, attention_qkvpacked, explain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(tokens: int, dim: int, dtype: torch.dtype = torch.float32, heads: int = 3) -> Tensor:
    return torch.randn(2, tokens, 3, heads, dim).to(dtype)


def by_heads(qkv: Tensor, **arguments: Any) -> Tensor:
    return attention(*qkv.permute(2, 0, 3, 1, 4), **arguments).transpose(1, 2)


def choices(name: str, tokens: int) -> dict[str, Any]:
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
        "bool": {"attn_mask": torch.rand(tokens, tokens) > 0.3},
        "added": {"attn_mask": torch.randn(2, 1, tokens, tokens)},
        "dropout": {"dropout_p": 0.2, "seed": 7},
    }[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 8), (17, 24), (70, 72), (300, 33)])
@pytest.mark.parametrize("name", ["plain", "causal", "scale", "bool", "added", "dropout"])
def test_the_bits_of_attention(
    backend: str, name: str, tokens: int, dim: int, dtype: torch.dtype
) -> None:
    qkv = draw(tokens, dim, dtype)
    arguments = choices(name, tokens)
    if name == "added":
        arguments["attn_mask"] = arguments["attn_mask"].to(dtype)
    one, two = (qkv.detach().requires_grad_() for _ in range(2))
    packed, plain = attention_qkvpacked(one, **arguments), by_heads(two, **arguments)
    assert packed.is_contiguous()
    assert packed.shape == (2, tokens, 3, dim)
    assert torch.equal(packed, plain)
    grad = torch.randn(packed.shape).to(dtype)
    packed.backward(grad)
    plain.backward(grad)
    assert one.grad is not None
    assert one.grad.is_contiguous()
    assert torch.equal(one.grad, two.grad)


def test_strided_rows_and_gradients(backend: str) -> None:
    """A projection's rows within wider ones, and a gradient whose columns are apart."""
    wide = torch.randn(2, 9, 3, 2, 20)
    one, two = wide[..., ::2].detach(), wide[..., ::2].contiguous()
    results = []
    for qkv in (one.requires_grad_(), two.requires_grad_()):
        out = attention_qkvpacked(qkv)
        out.backward(torch.arange(out.numel()).float().view(10, 2, 9, 2).permute(1, 2, 3, 0))
        results.append((out, qkv.grad))
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true)


def test_lse_and_a_learned_mask(backend: str) -> None:
    qkv, mask = draw(9, 8), torch.randn(9, 9, requires_grad=True)
    out, lse = attention_qkvpacked(qkv, return_lse=True)
    expected = attention(*qkv.permute(2, 0, 3, 1, 4), return_lse=True)
    assert torch.equal(out, expected[0].transpose(1, 2))
    assert torch.equal(lse, expected[1])
    attention_qkvpacked(qkv, attn_mask=mask).square().sum().backward()
    assert mask.grad is not None
    assert mask.grad.any()


@pytest.mark.parametrize("shape", [(0, 9, 3, 2, 8), (2, 0, 3, 2, 8), (2, 9, 3, 0, 8)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    qkv = torch.randn(shape, requires_grad=True)
    if shape[3] == 0:
        with pytest.raises(ValueError, match="must hold at least one head"):
            attention_qkvpacked(qkv)
        return
    out = attention_qkvpacked(qkv)
    assert out.shape == (*shape[:2], *shape[3:])
    out.sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.shape == shape


def test_autocast(backend: str) -> None:
    qkv = draw(9, 8).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_qkvpacked(qkv)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.dtype == torch.float32


def test_gradcheck() -> None:
    qkv = draw(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(attention_qkvpacked, qkv)


def test_compiled_as_eager(backend: str) -> None:
    compiled = torch.compile(attention_qkvpacked, fullgraph=True, backend="aot_eager")
    one, two = (draw(9, 8).copy_(torch.ones(())).requires_grad_() for _ in range(2))
    with torch.no_grad():
        two.copy_(one.normal_())
    found, plain = compiled(one), attention_qkvpacked(two)
    assert torch.equal(found, plain)
    grad = torch.randn_like(plain)
    found.backward(grad)
    plain.backward(grad)
    assert torch.equal(one.grad, two.grad)


def test_explained(native_cpu: None) -> None:
    assert explain("attention_qkvpacked", draw(9, 8)).backend == "cpu"


@pytest.mark.parametrize(
    ("qkv", "arguments", "error", "message"),
    [
        (torch.zeros(2, 9, 3, 8), {}, ValueError, r"qkv must be \[B, N, 3, H, d\]"),
        (torch.zeros(2, 9, 4, 2, 8), {}, ValueError, r"qkv must be \[B, N, 3, H, d\]"),
        (torch.zeros(2, 9, 3, 2, 8).long(), {}, TypeError, "qkv must be float32"),
        (draw(9, 8), {"attn_mask": torch.zeros(8, 9)}, ValueError, "attn_mask must broadcast"),
        (draw(9, 8), {"attn_mask": torch.zeros(9, 9).half()}, TypeError, "attn_mask must be bool"),
        (draw(9, 8), {"dropout_p": 0.5}, ValueError, "dropout_p needs a seed"),
    ],
)
def test_bad_input_is_named(
    qkv: Tensor, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attention_qkvpacked(qkv, **arguments)
    with pytest.raises(ValueError, match="exclude each other"):
        attention_qkvpacked(draw(9, 8), attn_mask=torch.zeros(9, 9), is_causal=True)
