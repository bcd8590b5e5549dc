"""`qk_norm_rope` and `rope_tables`, forward and backward, against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from _helpers.precision import forward_and_backward, judge
from _helpers.turning import draw_heads, eager_turned
from torch import Tensor

import vqkernels
from vqkernels import qk_norm_rope, rope_tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["rms", "layer", "none"]


@pytest.fixture(autouse=True)
def _by_reference() -> Iterator[None]:
    """There is no kernel for the CPU."""
    with vqkernels.use_backend("auto"):
        yield


def ours(norm: str, interleaved: bool, tables: tuple[Tensor, Tensor] | None):
    cos, sin = tables or (None, None)

    def function(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        q_weight, k_weight = weights or (None, None)
        return qk_norm_rope(
            q,
            k,
            q_weight=q_weight,
            k_weight=k_weight,
            cos=cos,
            sin=sin,
            norm=norm,
            interleaved=interleaved,
        )

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_against_eager(norm: str, interleaved: bool, dtype: torch.dtype) -> None:
    for heads, key_heads, tokens, dim in ((3, 3, 7, 64), (4, 2, 12, 72), (1, 1, 1, 2)):
        inputs, grads = draw_heads(heads, key_heads, tokens, dim, dtype)
        tables = rope_tables((tokens,), dim)
        by_sample = tuple(torch.stack([table, table.flip(0)]) for table in tables)
        for chosen in (None, tables, by_sample):
            functions = (f(norm, interleaved, chosen) for f in (ours, eager_turned))
            judge(*functions, inputs, grads)
            functions = (f(norm, interleaved, chosen) for f in (ours, eager_turned))
            judge(*functions, inputs[:2], grads)


def test_a_table_turns_by_its_angle() -> None:
    """Scalar products depend on the distance of two tokens alone."""
    cos, sin = rope_tables((32,), 64)
    row = torch.randn(2, 64)
    for interleaved in (False, True):
        q, k = (r.expand(1, 1, 32, 64) for r in row)
        q, k = qk_norm_rope(q, k, cos=cos, sin=sin, norm="none", interleaved=interleaved)
        products = (q.double() @ k.double().mT)[0, 0]
        for distance in (0, 1, 5):
            same = products.diagonal(distance)
            torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=2e-5)


def test_tables_of_grids() -> None:
    cos, sin = rope_tables((5,), 8, theta=100.0)
    angles = torch.arange(5.0)[:, None] * 100.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=1e-6)

    cos, _ = rope_tables((3, 4), 12)
    rows, _ = rope_tables((3,), 6)
    columns, _ = rope_tables((4,), 6)
    by_place = cos.view(3, 4, 6)
    assert torch.equal(by_place[..., :3], rows[:, None].expand(3, 4, 3))
    assert torch.equal(by_place[..., 3:], columns[None].expand(3, 4, 3))

    cos, sin = rope_tables((2, 3, 4), 64, axes_dim=(16, 24, 24))
    assert cos.shape == sin.shape == (24, 32)
    assert torch.equal(cos.view(2, 3, 4, 32)[1, 0, 0, :8], rope_tables((2,), 16)[0][1])
    assert [rope_tables(grid, 64)[0].shape[1] for grid in ((2,), (2, 3), (2, 3, 4))] == [32] * 3
    assert rope_tables((0,), 8)[0].shape == (0, 4)


def test_views_of_a_packed_qkv() -> None:
    packed = torch.randn(2, 9, 3, 4, 24)
    q, k, _ = packed.permute(2, 0, 3, 1, 4)
    tables = rope_tables((3, 3), 24)
    grads = [torch.randn(2, 4, 9, 24) for _ in "qk"]
    found = forward_and_backward(ours("rms", False, tables), (q, k), grads)
    copies = (q.contiguous(), k.contiguous())
    expected = forward_and_backward(ours("rms", False, tables), copies, grads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0].is_contiguous()


def test_empty_and_untouched() -> None:
    for shape in ((0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)):
        x, weight = torch.randn(shape), torch.randn(8)
        found = forward_and_backward(ours("rms", False, None), (x, x, weight, weight), [x, x])
        assert [t.shape for t in found] == [x.shape] * 4 + [weight.shape] * 2
        assert all((t == 0).all() for t in found[4:])
    x = torch.randn(1, 1, 2, 8)
    q, _ = qk_norm_rope(x, x, norm="none")
    assert torch.equal(q, x)
    assert q.data_ptr() != x.data_ptr()


def test_compiles_as_one_graph() -> None:
    cos, sin = rope_tables((6,), 8)
    (q, k, *weights), _ = draw_heads(2, 2, 6, 8, torch.float32)

    def function(q: Tensor, k: Tensor) -> Tensor:
        turned = qk_norm_rope(q, k, q_weight=weights[0], cos=cos, sin=sin)
        return (turned[0] * turned[1]).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one in (function, compiled):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        grads = torch.autograd.grad(one(*leaves), leaves)
        if one is function:
            expected = grads
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_autocast_leaves_dtypes_alone() -> None:
    (q, k, *_), _ = draw_heads(2, 2, 3, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert qk_norm_rope(q, k)[0].dtype == torch.float32


def test_bad_arguments() -> None:
    (q, k, weight, _), _ = draw_heads(2, 2, 3, 8, torch.float32)
    cos, sin = rope_tables((3,), 8)
    cases = (
        ({"q": q[0]}, r"q must be \[B, H, N, d\]"),
        ({"k": k[..., :4]}, "k must be .* with q's B, N and d"),
        ({"q_weight": weight[:4]}, r"q_weight must be \[8\]"),
        ({"cos": cos}, "cos and sin must be given together"),
        ({"cos": cos[:2], "sin": sin}, r"cos must be \[3, 4\] or \[2, 3, 4\]"),
        ({"cos": cos, "sin": sin.expand(2, 3, 4)}, "sin must have cos' shape"),
        ({"cos": cos.clone().requires_grad_(), "sin": sin}, "cos must not require a gradient"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"q": q[..., :7], "k": k[..., :7], "cos": cos, "sin": sin}, "even d"),
    )
    for given, message in cases:
        arguments = {"q": q, "k": k, **given}
        with pytest.raises(ValueError, match=message):
            qk_norm_rope(arguments.pop("q"), arguments.pop("k"), **arguments)
    with pytest.raises(TypeError, match="q must be float32"):
        qk_norm_rope(q.int(), k)
    for given, message in (
        ({"grid": (), "dim": 8}, "one to three axes"),
        ({"grid": (2,), "dim": 7}, "even"),
        ({"grid": (2, 2), "dim": 8, "axes_dim": (3, 5)}, "even widths"),
        ({"grid": (2, 2), "dim": 8, "axes_dim": (4,)}, "2 even widths"),
        ({"grid": (2,), "dim": 8, "theta": 0.0}, "theta must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_tables(**given)
    (grad,) = torch.autograd.grad(
        qk_norm_rope(leaf := q.clone().requires_grad_(), k)[0].square().sum(),
        leaf,
        create_graph=True,
    )
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()
