"""The modulation, attention and noise ops, each against its equation in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vqkernels.ops.ada_layer_norm import ada_layer_norm
from vqkernels.ops.attention import attention
from vqkernels.ops.bias_gelu import bias_gelu
from vqkernels.ops.gated_residual import gated_residual
from vqkernels.ops.gated_residual_ada_layer_norm import gated_residual_ada_layer_norm

B, N, D = 3, 12, 10
HALVES = [torch.float16, torch.bfloat16]
FRAMES = [None, 1, 4, N]


def tokens(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed)) + 3
    x[0, 0] *= 1000
    return x.to(dtype)


def vector(seed: int, frames: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (B, D) if frames is None else (B, frames, D)
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed)).to(dtype)


def row_of(modulation: Tensor, batch: int, token: int) -> Tensor:
    """The vector that serves one token, from the definition."""
    if modulation.dim() == 2:
        return modulation[batch].double()
    return modulation[batch, token // (N // modulation.shape[1])].double()


def norm_row(row: Tensor, norm: str, eps: float) -> Tensor:
    row = row.double()
    if norm == "layer":
        row = row - row.sum() / D
    return row / ((row * row).sum() / D + eps).sqrt()


def for_each_token(function) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.stack([torch.stack([function(b, n) for n in range(N)]) for b in range(B)])


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_ada_layer_norm_follows_its_equation(norm: str, frames: int | None) -> None:
    x, shift, scale = tokens(), vector(1, frames), vector(2, frames)
    weight, bias = torch.randn(D), torch.randn(D)
    expected = for_each_token(
        lambda b, n: (
            (norm_row(x[b, n], norm, 1e-3) * weight.double() + bias.double())
            * (1 + row_of(scale, b, n))
            + row_of(shift, b, n)
        )
    )
    out = ada_layer_norm(x, shift=shift, scale=scale, weight=weight, bias=bias, eps=1e-3, norm=norm)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("frames", FRAMES)
def test_gated_residual_follows_its_equation(frames: int | None) -> None:
    residual, x, gate = tokens(1), tokens(2), vector(3, frames)
    expected = for_each_token(
        lambda b, n: residual[b, n].double() + row_of(gate, b, n) * x[b, n].double()
    )
    out = gated_residual(residual, x, gate=gate)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gated_residual_ada_layer_norm_is_the_two_in_a_row(norm: str) -> None:
    residual, x = tokens(1), tokens(2)
    gate, shift, scale = vector(1, None), vector(2, 4), vector(3, N)
    normed, stream = gated_residual_ada_layer_norm(
        residual, x, gate=gate, shift=shift, scale=scale, eps=1e-4, norm=norm
    )
    assert torch.equal(stream, gated_residual(residual, x, gate=gate))
    expected = ada_layer_norm(stream, shift=shift, scale=scale, eps=1e-4, norm=norm)
    assert torch.equal(normed, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, gate = tokens(1, dtype), vector(3, None, dtype)
    shift, scale = vector(1, None, dtype), vector(2, None, dtype)
    wide = {"shift": shift.double(), "scale": scale.double()}
    cases = [
        (
            ada_layer_norm(x, shift=shift, scale=scale),
            ada_layer_norm(x.double(), **wide),
        ),
        (
            gated_residual(x, x.flip(1), gate=gate),
            gated_residual(x.double(), x.double().flip(1), gate=gate.double()),
        ),
        (bias_gelu(x, gate[0]), bias_gelu(x.double(), gate[0].double())),
    ]
    for out, exact in cases:
        assert out.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + 1e-6
        assert ((out.double() - exact).abs() <= rounding).all()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_bias_gelu_follows_its_equation(approximate: str) -> None:
    x, bias = torch.linspace(-6, 6, 4 * D).view(4, D), torch.randn(D)
    u = (x + bias).double()
    if approximate == "tanh":
        expected = u / 2 * (1 + (math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)).tanh())
    else:
        expected = u * torch.special.ndtr(u)
    out = bias_gelu(x, bias, approximate=approximate)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    without = bias_gelu(x + bias, approximate=approximate)
    torch.testing.assert_close(without, out)


def test_modulation_gradients() -> None:
    x, y = tokens(1).double() / 10, tokens(2).double() / 10
    gate, shift, scale = (vector(i, f).double() for i, f in ((1, None), (2, 4), (3, N)))
    weight, bias = torch.rand(D).double(), torch.rand(D).double()
    leaves = [t.requires_grad_() for t in (x, y, gate, shift, scale, weight, bias)]

    def everything(x, y, gate, shift, scale, weight, bias):  # type: ignore[no-untyped-def]
        h = ada_layer_norm(x, shift=shift, scale=scale, weight=weight, bias=bias)
        normed, stream = gated_residual_ada_layer_norm(
            h, y, gate=gate, shift=shift, scale=scale, norm="rms"
        )
        return gated_residual(stream, bias_gelu(normed, bias), gate=gate)

    assert torch.autograd.gradcheck(everything, leaves)


@pytest.mark.parametrize("gqa", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
def test_attention_follows_its_equation(mask: str, gqa: bool) -> None:
    torch.manual_seed(0)
    heads, keys, dim, value_dim = 4, 7, 8, 6
    q = torch.randn(B, N, heads, dim).transpose(1, 2)
    k = torch.randn(B, 2 if gqa else heads, keys, dim)
    v = torch.randn(B, 2 if gqa else heads, keys, value_dim)
    arguments: dict[str, object] = {"scale": 0.3, "enable_gqa": gqa}
    added = torch.zeros(N, keys).double()
    if mask == "causal":
        arguments["is_causal"] = True
        added[torch.arange(keys)[None] > torch.arange(N)[:, None]] = -torch.inf
    elif mask == "bool":
        allowed = torch.rand(N, keys) > 0.4
        allowed[:, 0] = True
        arguments["attn_mask"] = allowed
        added[~allowed] = -torch.inf
    elif mask == "added":
        arguments["attn_mask"] = torch.randn(N, keys)
        added = arguments["attn_mask"].double()  # type: ignore[attr-defined]

    group = heads // k.shape[1]
    out, lse = attention(q, k, v, return_lse=True, **arguments)  # type: ignore[arg-type]
    for head in range(heads):
        k_h, v_h = k[:, head // group].double(), v[:, head // group].double()
        scores = 0.3 * q[:, head].double() @ k_h.mT + added
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        torch.testing.assert_close(out[:, head].double(), weights @ v_h, rtol=1e-5, atol=1e-5)
        expected_lse = scores.exp().sum(-1).log()
        torch.testing.assert_close(lse[:, head].double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(attention(q, k, v, **arguments), out)  # type: ignore[arg-type]
    assert lse.dtype == torch.float32


def test_attention_query_without_keys() -> None:
    q = torch.randn(1, 2, 4, 8)
    allowed = torch.ones(4, 4, dtype=torch.bool)
    allowed[2] = False
    out, lse = attention(q, q, q, attn_mask=allowed, return_lse=True)
    assert (out[:, :, 2] == 0).all()
    assert (lse[:, :, 2] == -torch.inf).all()
    assert lse[:, :, [0, 1, 3]].isfinite().all()


x0 = torch.zeros(B, N, D)
level = torch.zeros(B)
ok = torch.zeros(B, D)
head = torch.zeros(1, 2, 3, 4)

BAD_CALLS = [
    (lambda: ada_layer_norm(x0[0], shift=ok, scale=ok), ValueError, r"x must be \[B, N, D\]"),
    (lambda: ada_layer_norm(x0.long(), shift=ok, scale=ok), TypeError, "x must be float32"),
    (lambda: ada_layer_norm(x0, shift=ok[:2], scale=ok), ValueError, "shift must be"),
    (lambda: ada_layer_norm(x0, shift=ok, scale=torch.zeros(B, 5, D)), ValueError, "F divides"),
    (lambda: ada_layer_norm(x0, shift=ok, scale=ok, weight=ok), ValueError, "weight must be"),
    (lambda: ada_layer_norm(x0, shift=ok, scale=ok, norm="batch"), ValueError, "norm must be"),
    (lambda: ada_layer_norm(x0, shift=ok.to("meta"), scale=ok), ValueError, "one device"),
    (lambda: gated_residual(x0, x0[:, 1:], gate=ok), ValueError, "x must have residual's shape"),
    (lambda: gated_residual(x0, x0, gate=ok[:, 1:]), ValueError, "gate must be"),
    (
        lambda: gated_residual_ada_layer_norm(x0, x0, gate=ok, shift=level, scale=ok),
        ValueError,
        "shift must be",
    ),
    (lambda: bias_gelu(x0, ok), ValueError, "bias must be"),
    (lambda: bias_gelu(x0, approximate="sigmoid"), ValueError, "approximate must be"),
    (lambda: attention(head[0], head, head), ValueError, "q must be"),
    (lambda: attention(head, head.half(), head), TypeError, "k must have q's dtype"),
    (lambda: attention(head, head[..., 1:], head), ValueError, "k must be"),
    (lambda: attention(head, head, head[:, :, 1:]), ValueError, "v must be"),
    (lambda: attention(head, head[:, :1], head[:, :1]), ValueError, "enable_gqa"),
    (
        lambda: attention(head, head, head, attn_mask=torch.ones(3, 2).bool()),
        ValueError,
        "attn_mask must broadcast",
    ),
    (
        lambda: attention(head, head, head, attn_mask=torch.ones(3, 3).long()),
        TypeError,
        "attn_mask must be bool",
    ),
    (
        lambda: attention(head, head, head, attn_mask=torch.ones(3, 3).bool(), is_causal=True),
        ValueError,
        "exclude each other",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_bad_input_is_named(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
