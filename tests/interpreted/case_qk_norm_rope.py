"""`qk_norm_rope` and its gradients against float64, through the op's own autograd."""

from __future__ import annotations

import pytest
import torch
from _helpers.precision import forward_and_backward, judge
from _helpers.turning import draw_heads, eager_turned
from torch import Tensor

from vqkernels.ops.qk_norm_rope import rope_tables
from vqkernels.triton import qk_norm_rope, qk_norm_rope_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["rms", "layer", "none"]
OP = torch.ops.vqkernels.qk_norm_rope


def ours(norm: str, interleaved: bool, tables: tuple[Tensor, Tensor] | None):
    tables = tables or (None, None)

    def function(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return OP(q, k, *(weights or (None, None)), *tables, 1e-6, norm, interleaved, "triton")

    return function


def check(norm: str, interleaved: bool, tables, inputs, grads) -> None:
    functions = (f(norm, interleaved, tables) for f in (ours, eager_turned))
    judge(*functions, inputs, grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_against_eager(norm, interleaved, dtype):
    for heads, key_heads, tokens, dim in ((3, 3, 7, 64), (4, 2, 5, 72), (1, 1, 1, 2)):
        inputs, grads = draw_heads(heads, key_heads, tokens, dim, dtype)
        tables = rope_tables((tokens,), dim)
        by_sample = tuple(torch.stack([table, table.flip(0)]) for table in tables)
        check(norm, interleaved, None, inputs, grads)
        check(norm, interleaved, tables, inputs[:2], grads)
        check(norm, interleaved, by_sample, inputs, grads)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 3, 5, 6, 30, 96, 128, 256])
def test_columns(dim, interleaved):
    inputs, grads = draw_heads(2, 1, 5, dim, torch.float32)
    tables = rope_tables((5,), dim) if dim % 2 == 0 else None
    check("rms", interleaved, tables, inputs, grads)
    # The two columns of a centred pair have no gradient but rounding.
    check("layer" if dim > 2 else "none", interleaved, tables, inputs, grads)


def test_one_column():
    inputs, grads = draw_heads(2, 1, 5, 1, torch.float32)
    check("none", False, None, inputs, grads)
    found = ours("rms", True, None)(*inputs)
    expected = eager_turned("rms", True, None)(*(t.double() for t in inputs))
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=0)


def test_several_tiles_and_chunks():
    """Small tiles: tokens in several programs, and more of them than are added up at once."""
    inputs, grads = draw_heads(2, 2, 70, 8, torch.float32, batch=1)
    q, k, *weights = inputs
    cos, sin = rope_tables((7, 10), 8)
    arguments = (*weights, cos, sin, 1e-6, "rms", True)
    found = (
        *qk_norm_rope(q, k, *arguments, rows=4),
        *qk_norm_rope_backward(*grads, q, k, *arguments, rows=1),
    )
    exact = forward_and_backward(
        eager_turned("rms", True, (cos, sin)),
        [t.double() for t in inputs],
        [g.double() for g in grads],
    )
    for mine, true in zip(found, exact, strict=True):
        limit = 2e-6 * max(1.0, float(true.abs().max()))
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_views_give_what_their_copies_give(interleaved, dtype):
    packed = torch.randn(2, 9, 3, 4, 24).to(dtype)
    by_column = torch.randn(2, 4, 24, 9).to(dtype).mT
    tables = tuple(t.repeat_interleave(2, 1)[:, ::2] for t in rope_tables((3, 3), 24))
    q, k, _ = packed.permute(2, 0, 3, 1, 4)
    grads = [g.permute(0, 2, 1, 3) for g in torch.randn(2, 2, 9, 4, 24).to(dtype)]
    for pair in ((q, k), (by_column, q), (q[:, :1].expand(-1, 4, -1, -1), k)):
        found = forward_and_backward(ours("rms", interleaved, tables), pair, grads)
        copies = [t.contiguous() for t in pair]
        expected = forward_and_backward(
            ours("rms", interleaved, [t.contiguous() for t in tables]),
            copies,
            [g.contiguous() for g in grads],
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_mean_far_above_the_deviation():
    q = torch.randn(1, 2, 5, 64) + 1e4
    found, _ = ours("layer", False, None)(q, q)
    expected, _ = eager_turned("layer", False, None)(q.double(), q.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_what_is_no_number_stays_in_its_row():
    q = torch.randn(1, 2, 5, 12)
    tables = rope_tables((5,), 12)
    clean, _ = ours("rms", True, tables)(q, q)
    broken = q.clone()
    broken[0, 1, 2, 3] = torch.nan
    found, _ = ours("rms", True, tables)(broken, q)
    assert found[0, 1, 2].isnan().all()
    found[0, 1, 2] = clean[0, 1, 2]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)])
def test_empty(shape):
    x, weight = torch.randn(shape), torch.randn(8)
    found = forward_and_backward(ours("rms", False, None), (x, x, weight, weight), [x, x])
    assert [t.shape for t in found] == [x.shape] * 4 + [weight.shape] * 2
    assert all((t == 0).all() for t in found[4:])
