"""The MLP branch as one call: against plain PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _helpers.modulation import eager_gate, eager_norm, randn
from _helpers.precision import forward_and_backward, judge
from torch import Tensor
from torch.nn import functional as F

from vqkernels import explain, modulated_mlp, use_backend
from vqkernels.reference.modulated_mlp import modulated_mlp as by_reference

NAMES = ("shift", "scale", "gate", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    dim: int, dtype: torch.dtype, tokens: int = 12, frames: int | None = None, hidden: int = 50
) -> list[Tensor]:
    """x and what NAMES says; every parameter is random, since zeros hide what is wrong."""
    size = (2, 6 * dim) if frames is None else (2, frames, 6 * dim)
    vectors = randn(*size, dtype=dtype).chunk(6, dim=-1)[3:]
    first = (randn(hidden, dim, dtype=dtype) / dim**0.5, randn(hidden, dtype=dtype))
    second = (randn(dim, hidden, dtype=dtype) / hidden**0.5, randn(dim, dtype=dtype))
    return [randn(2, tokens, dim, dtype=dtype), *vectors, *first, *second]


def eager(norm: str = "layer", approximate: str = "tanh") -> Any:
    def function(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *weights: Tensor) -> Tensor:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
        hidden = F.linear(eager_norm(norm)(x, shift, scale), fc1_weight, fc1_bias)
        hidden = F.gelu(hidden, approximate=approximate)
        return eager_gate(x, F.linear(hidden, fc2_weight, fc2_bias), gate)

    return function


def ours(call: Any = modulated_mlp, **arguments: Any) -> Any:
    def function(x: Tensor, *given: Tensor) -> Tensor:
        return call(x, **dict(zip(NAMES, given, strict=True)), **arguments)

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 33, 216])
@pytest.mark.parametrize("tokens", [1, 12, 70])
def test_branch_and_its_gradients(backend: str, dim: int, tokens: int, dtype: torch.dtype) -> None:
    judge(ours(), eager(), inputs(dim, dtype, tokens), [randn(2, tokens, dim, dtype=dtype)])


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("frames", [None, 3, 12])
def test_choices(backend: str, norm: str, frames: int | None, approximate: str) -> None:
    choices = {"norm": norm, "approximate": approximate}
    given, grads = inputs(24, torch.float32, frames=frames), [torch.randn(2, 12, 24)]
    judge(ours(**choices), eager(**choices), given, grads)
    judge(ours(by_reference, **choices), eager(**choices), given, grads)


def test_without_biases(backend: str) -> None:
    x, shift, scale, gate, fc1_weight, _, fc2_weight, _ = inputs(24, torch.float32)
    plain = eager()(x, shift, scale, gate, fc1_weight, None, fc2_weight, None)
    found = modulated_mlp(
        x, shift=shift, scale=scale, gate=gate, fc1_weight=fc1_weight, fc2_weight=fc2_weight
    )
    torch.testing.assert_close(found, plain)


def test_empty_batch(backend: str) -> None:
    given = [t[:0] if i < 4 else t for i, t in enumerate(inputs(24, torch.float32))]
    assert ours()(*given).shape == (0, 12, 24)


def test_autocast_follows_linear(backend: str) -> None:
    given = inputs(24, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = forward_and_backward(ours(), given, [torch.randn(2, 12, 24)])
    assert all(t.dtype == torch.float32 for t in found)
    torch.testing.assert_close(found[0], eager()(*given), rtol=0.1, atol=0.1)


def test_float64_is_exact() -> None:
    given = inputs(24, torch.float64)
    torch.testing.assert_close(ours()(*given), eager()(*given))
    leaves = [t.requires_grad_() for t in inputs(6, torch.float64, tokens=4, hidden=7)]
    assert torch.autograd.gradcheck(ours(), leaves)


def test_the_same_bits_each_time(backend: str) -> None:
    given, grads = inputs(216, torch.float32, tokens=300), [torch.randn(2, 300, 216)]
    first, second = (forward_and_backward(ours(), given, grads) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_explained(native_cpu: None) -> None:
    given = dict(zip(NAMES, inputs(24, torch.float32)[1:], strict=True))
    assert explain("modulated_mlp", torch.randn(2, 12, 24), **given).backend == "cpu"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fc1_weight": torch.zeros(50, 25)}, ValueError, r"fc1_weight must be \[M, 24\]"),
        ({"fc2_weight": torch.zeros(24, 51)}, ValueError, r"fc2_weight must be \[24, 50\]"),
        ({"fc1_bias": torch.zeros(24)}, ValueError, r"fc1_bias must be \[50\]"),
        ({"fc2_weight": torch.zeros(24, 50).half()}, TypeError, "must have x's dtype"),
        ({"shift": torch.zeros(3, 24)}, ValueError, r"shift must be \[2, 24\]"),
        ({"approximate": "relu"}, ValueError, "approximate must be one of"),
        ({"x": torch.zeros(2, 24)}, ValueError, r"x must be \[B, N, D\]"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, *rest = inputs(24, torch.float32)
    arguments = {"x": x, **dict(zip(NAMES, rest, strict=True)), **change}
    with pytest.raises(error, match=message):
        modulated_mlp(**arguments)


def test_a_backend_by_name_must_serve_every_part() -> None:
    with use_backend("triton"), pytest.raises(ValueError, match="cannot serve ada_layer_norm"):
        ours()(*inputs(24, torch.float32))
