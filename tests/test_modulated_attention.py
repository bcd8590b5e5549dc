"""The attention branch as one call: against plain PyTorch in float64, and what it must not cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _helpers.modulation import eager_gate, eager_norm, randn
from _helpers.precision import forward_and_backward, judge
from torch import Tensor
from torch.nn import functional as F

from vqkernels import explain, modulated_attention, reference, rope_tables, use_backend
from vqkernels.reference.modulated_attention import modulated_attention as by_reference

NAMES = ("shift", "scale", "gate", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = 3


def inputs(
    dim: int, dtype: torch.dtype, tokens: int = 12, frames: int | None = None
) -> list[Tensor]:
    """x and what NAMES says; every parameter is random, since zeros hide what is wrong."""
    size = (2, 6 * dim) if frames is None else (2, frames, 6 * dim)
    vectors = randn(*size, dtype=dtype).chunk(6, dim=-1)[:3]
    weights = (randn(3 * dim, dim, dtype=dtype) / dim**0.5, randn(3 * dim, dtype=dtype))
    projection = (randn(dim, dim, dtype=dtype) / dim**0.5, randn(dim, dtype=dtype))
    return [randn(2, tokens, dim, dtype=dtype), *vectors, *weights, *projection]


def eager(num_heads: int, norm: str = "layer", **arguments: Any) -> Any:
    """The branch from its equations, with PyTorch's layers."""

    def function(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
        qkv_weight, qkv_bias, proj_weight, proj_bias = weights
        qkv = F.linear(eager_norm(norm)(x, shift, scale), qkv_weight, qkv_bias)
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, **arguments)
        return eager_gate(x, F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), gate)

    return function


def ours(num_heads: int, **arguments: Any) -> Any:
    def function(x: Tensor, *given: Tensor) -> Tensor:
        named = dict(zip(NAMES, given, strict=True))
        return modulated_attention(x, **named, num_heads=num_heads, **arguments)

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [12, 33, 216])
@pytest.mark.parametrize("tokens", [1, 12, 70])
def test_branch_and_its_gradients(backend: str, dim: int, tokens: int, dtype: torch.dtype) -> None:
    judge(
        ours(HEADS), eager(HEADS), inputs(dim, dtype, tokens), [randn(2, tokens, dim, dtype=dtype)]
    )


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("frames", [None, 3, 12])
def test_norms_and_frames(backend: str, norm: str, frames: int | None) -> None:
    given = inputs(24, torch.float32, frames=frames)
    grads = [torch.randn(2, 12, 24)]
    judge(ours(HEADS, norm=norm), eager(HEADS, norm), given, grads)


@pytest.mark.parametrize("arguments", [{"is_causal": True}, {"attn_mask": True}])
def test_masks(backend: str, arguments: dict[str, Any]) -> None:
    if "attn_mask" in arguments:
        arguments = {"attn_mask": (torch.rand(12, 12) > 0.3) | torch.eye(12, dtype=torch.bool)}
    given = inputs(24, torch.float32)
    judge(ours(HEADS, **arguments), eager(HEADS, **arguments), given, [torch.randn(2, 12, 24)])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("qk_norm", ["none", "rms", "layer"])
def test_normalized_and_turned_heads(backend: str, qk_norm: str, interleaved: bool) -> None:
    cos, sin = rope_tables((3, 4), 8)
    tables = {"cos": cos, "sin": sin, "interleaved": interleaved, "qk_norm": qk_norm}
    given = [*inputs(24, torch.float32), torch.randn(8), torch.randn(8)]

    def function(call: Any) -> Any:
        def run(x: Tensor, *rest: Tensor) -> Tensor:
            *rest, q_weight, k_weight = rest
            named = dict(zip(NAMES, rest, strict=True))
            weights = {} if qk_norm == "none" else {"q_weight": q_weight, "k_weight": k_weight}
            out = call(x, **named, num_heads=HEADS, **tables, **weights)
            return out + 0 * (q_weight + k_weight).sum()

        return run

    judge(function(modulated_attention), function(by_reference), given, [torch.randn(2, 12, 24)])


def test_without_biases(backend: str) -> None:
    x, shift, scale, gate, qkv_weight, _, proj_weight, _ = inputs(24, torch.float32)
    plain = eager(HEADS)(x, shift, scale, gate, qkv_weight, None, proj_weight, None)
    found = modulated_attention(
        x, shift=shift, scale=scale, gate=gate, qkv_weight=qkv_weight, proj_weight=proj_weight,
        num_heads=HEADS,
    )  # fmt: skip
    torch.testing.assert_close(found, plain)


def test_empty_batch(backend: str) -> None:
    given = [t[:0] if i < 4 else t for i, t in enumerate(inputs(24, torch.float32))]
    assert ours(HEADS)(*given).shape == (0, 12, 24)


def test_autocast_follows_linear(backend: str) -> None:
    given = inputs(24, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = forward_and_backward(ours(HEADS), given, [torch.randn(2, 12, 24)])
    assert all(t.dtype == torch.float32 for t in found)
    torch.testing.assert_close(found[0], eager(HEADS)(*given), rtol=0.1, atol=0.1)


def test_float64_is_exact() -> None:
    given = inputs(24, torch.float64)
    torch.testing.assert_close(ours(HEADS)(*given), eager(HEADS)(*given))
    leaves = [t.requires_grad_() for t in inputs(6, torch.float64, tokens=4)]
    assert torch.autograd.gradcheck(ours(HEADS), leaves)


def test_the_same_bits_each_time(backend: str) -> None:
    given, grads = inputs(216, torch.float32, tokens=300), [torch.randn(2, 300, 216)]
    first, second = (forward_and_backward(ours(HEADS), given, grads) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_explained(native_cpu: None) -> None:
    given = dict(zip(NAMES, inputs(24, torch.float32)[1:], strict=True))
    assert explain("modulated_attention", torch.randn(2, 12, 24), **given).backend == "cpu"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "num_heads must divide x's 24 columns, got 5"),
        ({"qkv_weight": torch.zeros(24, 24)}, ValueError, r"qkv_weight must be \[72, 24\]"),
        ({"proj_weight": torch.zeros(24, 25)}, ValueError, r"proj_weight must be \[24, 24\]"),
        ({"proj_bias": torch.zeros(25)}, ValueError, r"proj_bias must be \[24\]"),
        (
            {"qkv_weight": torch.zeros(72, 24).half()},
            TypeError,
            "must have x's dtype torch.float32",
        ),
        ({"gate": torch.zeros(3, 24)}, ValueError, r"gate must be \[2, 24\]"),
        ({"qk_norm": "batch"}, ValueError, "norm must be one of"),
        ({"x": torch.zeros(2, 24)}, ValueError, r"x must be \[B, N, D\]"),
        ({"x": torch.zeros(2, 12, 24).long()}, TypeError, "x must be float32"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, *rest = inputs(24, torch.float32)
    arguments = {"x": x, **dict(zip(NAMES, rest, strict=True)), "num_heads": HEADS, **change}
    with pytest.raises(error, match=message):
        modulated_attention(**arguments)


def test_a_backend_by_name_must_serve_every_part() -> None:
    with use_backend("triton"), pytest.raises(ValueError, match="cannot serve ada_layer_norm"):
        ours(HEADS)(*inputs(24, torch.float32))


def test_reference_is_the_equation() -> None:
    assert reference.modulated_attention.modulated_attention is by_reference
    x, *rest = inputs(24, torch.float64)
    found = by_reference(x, **dict(zip(NAMES, rest, strict=True)), num_heads=HEADS)
    torch.testing.assert_close(found, eager(HEADS)(x, *rest))
