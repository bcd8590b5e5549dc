"""`qk_norm_rope` and `rope_tables`, forward and backward, against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from _helpers.precision import forward_and_backward, judge
from _helpers.turning import draw_heads, eager_turned
from torch import Tensor

import vqkernels
from vqkernels import qk_norm_rope, rope_tables

every_capability = pytest.mark.every_capability
pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["rms", "layer", "none"]
# Heads of q and of k, tokens, columns.
SHAPES = [(3, 3, 7, 64), (4, 2, 12, 72), (1, 1, 1, 2), (2, 1, 37, 80), (1, 2, 17, 6)]


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


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_against_eager(backend: str, norm: str, interleaved: bool, dtype: torch.dtype) -> None:
    for heads, key_heads, tokens, dim in SHAPES:
        inputs, grads = draw_heads(heads, key_heads, tokens, dim, dtype)
        tables = rope_tables((tokens,), dim)
        by_sample = tuple(torch.stack([table, table.flip(0)]) for table in tables)
        for chosen in (None, tables, by_sample):
            functions = (f(norm, interleaved, chosen) for f in (ours, eager_turned))
            judge(*functions, inputs, grads)
            functions = (f(norm, interleaved, chosen) for f in (ours, eager_turned))
            judge(*functions, inputs[:2], grads)


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dim", [1, 5, 33, 96, 128, 250, 256])
def test_any_width(native_cpu: None, dim: int, norm: str, dtype: torch.dtype) -> None:
    inputs, grads = draw_heads(2, 1, 6, dim, dtype)
    tables = rope_tables((6,), dim) if dim % 2 == 0 else None
    for interleaved in (False, True):
        judge(*(f(norm, interleaved, tables) for f in (ours, eager_turned)), inputs, grads)


@every_capability
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_outliers(backend: str, norm: str) -> None:
    """Rows far from zero beside their deviation, one huge column, zeros, fp16's largest number."""
    for dtype in DTYPES:
        inputs, grads = draw_heads(2, 2, 9, 64, dtype)
        q = inputs[0]
        q[:, :, 0] += 300
        q[:, :, 1, 5] = 3000
        q[:, :, 2] = 0
        q[:, 0, 3, ::2], q[:, 0, 3, 1::2] = 65504, -65504
        judge(*(f(norm, False, rope_tables((9,), 64)) for f in (ours, eager_turned)), inputs, grads)


@every_capability
def test_a_row_without_numbers_spoils_no_other(native_cpu: None) -> None:
    (q, k, *weights), grads = draw_heads(2, 2, 9, 24, torch.float32)
    broken = q.clone()
    broken[:, :, 4, 3] = torch.nan
    for norm in NORMS:
        function = ours(norm, True, rope_tables((9,), 24))
        expected = forward_and_backward(function, (q, k, *weights), grads)
        found = forward_and_backward(function, (broken, k, *weights), grads)
        kept = torch.arange(9) != 4
        for i in (0, 2):
            assert torch.equal(found[i][:, :, kept], expected[i][:, :, kept])
            assert norm == "none" or found[i][:, :, 4].isnan().all()
        assert all(torch.equal(found[i], expected[i]) for i in (1, 3, 5))


@every_capability
def test_dtypes_that_differ(backend: str) -> None:
    """Of q, k, weights and tables: each is read as it is."""
    (q, k, weight, _), (grad_q, grad_k) = draw_heads(2, 2, 5, 24, torch.float32)
    q, k, grad_q, grad_k = q.half(), k.bfloat16(), grad_q.half(), grad_k.bfloat16()
    cos, sin = (t.double().bfloat16() for t in rope_tables((5,), 24))
    function = ours("rms", False, (cos, sin))
    found = forward_and_backward(function, (q, k, weight, weight.half()), [grad_q, grad_k])
    kinds = [torch.float16, torch.bfloat16] * 2 + [torch.float32, torch.float16]
    assert [t.dtype for t in found] == kinds
    wide = [t.double() for t in (q, k, weight, weight.half(), grad_q, grad_k)]
    exact = forward_and_backward(function_in_float64(cos, sin), wide[:4], wide[4:])
    for one, true in zip(found, exact, strict=True):
        eps = max(torch.finfo(one.dtype).eps, 1e-6)
        assert (one.double() - true).abs().max() <= eps * true.abs().max()


def function_in_float64(cos: Tensor, sin: Tensor):
    return eager_turned("rms", False, (cos.double(), sin.double()))


def test_float64_goes_to_the_reference() -> None:
    q = torch.randn(1, 1, 2, 4).double().requires_grad_()
    assert vqkernels.explain("qk_norm_rope", q, q).backend == "reference"
    assert torch.autograd.gradcheck(ours("layer", True, rope_tables((2,), 4)), (q, q))


def test_a_table_turns_by_its_angle(backend: str) -> None:
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


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_views_give_what_their_copies_give(
    backend: str, interleaved: bool, dtype: torch.dtype
) -> None:
    """A packed qkv, columns apart, heads repeated; gradients as attention leaves them."""
    packed = torch.randn(2, 9, 3, 4, 48).to(dtype)
    q, k, _ = packed.permute(2, 0, 3, 1, 4)
    grads = [torch.randn(2, 9, 4, 24).to(dtype).transpose(1, 2) for _ in "qk"]
    weights = list(torch.randn(2, 48)[:, ::2].unbind())
    cos, sin = rope_tables((3, 3), 48)
    tables = cos[:, ::2], sin[:, ::2].expand(2, 9, 12)
    tables = tables[0].expand(2, 9, 12), tables[1]
    function, plain = (
        ours("rms", interleaved, chosen)
        for chosen in (tables, tuple(t.contiguous() for t in tables))
    )
    for views in (
        (q[..., :24], k[..., 24:]),
        (q[..., ::2], k[..., ::2]),
        (q[:, :1, :, :24].expand(-1, 4, -1, -1), k[:, :, :1, :24].expand(-1, -1, 9, -1)),
    ):
        found = forward_and_backward(function, (*views, *weights), grads)
        copies = [t.contiguous() for t in (*views, *weights)]
        expected = forward_and_backward(plain, copies, [g.contiguous() for g in grads])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert found[0].is_contiguous()


@every_capability
def test_same_bits_at_any_number_of_threads(native_cpu: None, restored_threads: None) -> None:
    inputs, grads = draw_heads(6, 3, 150, 64, torch.float32)
    function = ours("layer", False, rope_tables((150,), 64))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(forward_and_backward(function, inputs, grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_capability
def test_a_row_does_not_depend_on_the_batch(native_cpu: None) -> None:
    (q, k, *_), _ = draw_heads(2, 2, 23, 40, torch.bfloat16)
    cos, sin = rope_tables((23,), 40)
    whole = qk_norm_rope(q, k, cos=cos, sin=sin)
    for token in (0, 6, 22):
        one = slice(token, token + 1)
        parts = qk_norm_rope(q[:1, :, one], k[:1, :, one], cos=cos[one], sin=sin[one])
        for part, all_rows in zip(parts, whole, strict=True):
            assert torch.equal(part, all_rows[:1, :, one])


@every_capability
def test_empty_and_untouched(backend: str) -> None:
    for shape in ((0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)):
        x, weight = torch.randn(shape), torch.randn(8)
        found = forward_and_backward(ours("rms", False, None), (x, x, weight, weight), [x, x])
        assert [t.shape for t in found] == [x.shape] * 4 + [weight.shape] * 2
        assert all((t == 0).all() for t in found[4:])
    x = torch.randn(1, 1, 2, 8)
    q, _ = qk_norm_rope(x, x, norm="none")
    assert torch.equal(q, x)
    assert q.data_ptr() != x.data_ptr()


def test_compiles_as_one_graph(backend: str) -> None:
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


def test_autocast_leaves_dtypes_alone(backend: str) -> None:
    (q, k, *_), _ = draw_heads(2, 2, 3, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert qk_norm_rope(q, k)[0].dtype == torch.float32


def test_bad_arguments(backend: str) -> None:
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
