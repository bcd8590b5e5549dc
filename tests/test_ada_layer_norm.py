"""The modulation ops, forward and backward, against plain PyTorch in float64.

All vectors are random: gates that start at zero would hide every error behind them.
"""

from __future__ import annotations

import pytest
import torch
from _helpers.modulation import (
    eager_fused,
    eager_gate,
    eager_norm,
    our_fused,
    our_gate,
    our_norm,
    randn,
    vector,
)
from _helpers.precision import assert_rounded_once, forward_and_backward, judge
from torch.nn import functional as F

import vqkernels
from vqkernels import ada_layer_norm, gated_residual_ada_layer_norm

every_capability = pytest.mark.every_capability
pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["layer", "rms"]
# Rows together, chunks of rows and vectors of columns all have remainders in some of these.
SHAPES = [(1, 1, 3), (2, 3, 5), (3, 12, 70), (2, 140, 33), (1, 67, 384), (2, 5, 1152)]


def frames_of(tokens: int) -> list[int | None]:
    return [None, 1, tokens] if tokens < 12 else [None, tokens, 4 if tokens % 4 == 0 else 1]


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_ada_layer_norm(
    backend: str, norm: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    batch, tokens, dim = shape
    x, grad = randn(*shape, dtype=dtype) + 0.5, randn(*shape, dtype=dtype)
    affine = (randn(dim, dtype=dtype), randn(dim, dtype=dtype))
    for frames in frames_of(tokens):
        for more in ((), affine):
            shift, scale = (vector(batch, f, dim, dtype) for f in (frames, None))
            judge(our_norm(norm), eager_norm(norm), (x, shift, scale, *more), [grad])


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, tokens, dim = shape
    residual, x, grad = (randn(*shape, dtype=dtype) for _ in range(3))
    for frames in frames_of(tokens):
        judge(our_gate, eager_gate, (residual, x, vector(batch, frames, dim, dtype)), [grad])


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_gated_residual_ada_layer_norm(
    backend: str, norm: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    batch, tokens, dim = shape
    residual, x, *grads = (randn(*shape, dtype=dtype) for _ in range(4))
    every = frames_of(tokens)
    for i, frames in enumerate(every):
        gate, shift, scale = (
            vector(batch, f, dim, dtype) for f in (frames, every[i - 1], every[i - 2])
        )
        judge(our_fused(norm), eager_fused(norm), (residual, x, gate, shift, scale), grads)


@every_capability
@pytest.mark.parametrize("norm", NORMS)
def test_only_one_of_two_results_has_a_gradient(backend: str, norm: str) -> None:
    inputs = [torch.randn(2, 9, 20), torch.randn(2, 9, 20), *(torch.randn(2, 20) for _ in "123")]
    for kept in (0, 1):
        ours = lambda *t, kept=kept: our_fused(norm)(*t)[kept]  # noqa: E731
        exact = lambda *t, kept=kept: eager_fused(norm)(*t)[kept]  # noqa: E731
        grad = torch.randn(2, 9, 20)
        leaves = [t.clone().requires_grad_() for t in inputs]
        wide = [t.double().requires_grad_() for t in inputs]
        found = torch.autograd.grad(ours(*leaves), leaves, grad, allow_unused=True)
        expected = torch.autograd.grad(exact(*wide), wide, grad.double(), allow_unused=True)
        for mine, true in zip(found, expected, strict=True):
            if true is None:
                assert mine is None
            else:
                torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


@every_capability
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_vectors_and_branch_of_another_dtype(backend: str, half: torch.dtype) -> None:
    """Half tokens under fp32 vectors, and an fp32 stream with a half branch: one rounding each."""
    batch, tokens, dim = 2, 70, 40
    x, grad = randn(batch, tokens, dim, dtype=half), randn(batch, tokens, dim, dtype=half)
    residual, passed = torch.randn(batch, tokens, dim), torch.randn(batch, tokens, dim)
    gate, shift, scale = (torch.randn(batch, dim) for _ in range(3))
    affine = (torch.randn(dim), torch.randn(dim))

    found = forward_and_backward(our_norm("layer"), (x, shift, scale, *affine), [grad])
    wide = (x.double(), shift.double(), scale.double(), *(a.double() for a in affine))
    exact = forward_and_backward(eager_norm("layer"), wide, [grad.double()])
    assert [t.dtype for t in found] == [half, half] + [torch.float32] * 4
    assert_rounded_once(found, exact)

    inputs = (residual, x, gate.to(half), shift, scale.to(half))
    found = forward_and_backward(our_fused("rms"), inputs, [passed, passed.flip(1)])
    wide = tuple(t.double() for t in inputs)
    grads = [passed.double(), passed.flip(1).double()]
    exact = forward_and_backward(eager_fused("rms"), wide, grads)
    single = torch.float32
    assert [t.dtype for t in found] == [single, single, single, half, half, single, half]
    assert_rounded_once(found, exact)

    inputs = (x, residual, gate)
    found = forward_and_backward(our_gate, inputs, [grad])
    exact = forward_and_backward(eager_gate, [t.double() for t in inputs], [grad.double()])
    assert [t.dtype for t in found] == [half, half, single, single]
    assert_rounded_once(found, exact)


@every_capability
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers(backend: str, dtype: torch.dtype, norm: str) -> None:
    """A mean far above the deviation, the format's largest numbers, tiny rows and equal ones."""
    dim = 160
    rows = torch.randn(8, dim)
    rows[0] += 1000
    rows[1] = rows[1] * 0.25 - 4000
    rows[2] *= 1e-4
    rows[3] = 3
    rows[4, 7] = 65504
    rows[5, ::2], rows[5, 1::2] = 65504, -65504
    rows[6] = 65504
    rows[7] = 0
    x = rows[None].to(dtype)
    shift, scale = randn(1, dim, dtype=dtype), randn(1, dim, dtype=dtype)
    grad = randn(1, 8, dim, dtype=dtype)
    for row in range(8):
        one = x[:, row : row + 1]
        judge(our_norm(norm), eager_norm(norm), (one, shift, scale), [grad[:, row : row + 1]])
    gate = randn(1, dim, dtype=dtype) * 0.01
    branch = randn(1, 8, dim, dtype=dtype)
    for row in range(8):
        here = slice(row, row + 1)
        inputs = (x[:, here], branch[:, here], gate, shift, scale)
        grads = [grad[:, here], grad[:, here].flip(-1)]
        judge(our_fused(norm), eager_fused(norm), inputs, grads)


@every_capability
def test_a_mean_far_above_the_deviation_costs_no_digits(native_cpu: None) -> None:
    """What is subtracted is the mean and what its rounding left, so only x's own digits count."""
    x = (torch.randn(1, 20, 512) + 1e5).requires_grad_()
    zero = torch.zeros(1, 512)
    out = ada_layer_norm(x, shift=zero, scale=zero)
    exact = F.layer_norm(x.detach().double(), (512,), eps=1e-6)
    assert (out.double() - exact).abs().max() <= 2e-6


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_in_its_row(backend: str, dtype: torch.dtype) -> None:
    x = randn(2, 6, 40, dtype=dtype)
    shift, scale, gate = (randn(2, 40, dtype=dtype) for _ in range(3))
    clean = ada_layer_norm(x, shift=shift, scale=scale)
    x[0, 2, 3], x[1, 4, 0], x[1, 5, 39] = torch.nan, torch.inf, -torch.inf
    out = ada_layer_norm(x, shift=shift, scale=scale)
    broken = torch.zeros(2, 6, dtype=torch.bool)
    broken[0, 2] = broken[1, 4] = broken[1, 5] = True
    assert out[broken].isnan().all()
    assert torch.equal(out[~broken], clean[~broken])
    normed, stream = gated_residual_ada_layer_norm(x, x, gate=gate, shift=shift, scale=scale)
    assert normed[broken].isnan().all()
    assert normed[~broken].isfinite().all()
    assert (stream.isfinite() == x.isfinite()).all()


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_give_what_their_copies_give(native_cpu: None, dtype: torch.dtype) -> None:
    batch, tokens, dim = 2, 10, 48
    shift, scale, gate, *_ = randn(batch, 6 * dim, dtype=dtype).chunk(6, dim=1)
    wide = randn(batch, tokens, 2 * dim, dtype=dtype)
    by_column = randn(batch, dim, tokens, dtype=dtype).transpose(1, 2)
    for x in (wide[..., :dim], wide[:, :, ::2], by_column, wide[:, :1, :dim].expand(-1, 10, -1)):
        for function, inputs in (
            (our_norm("layer"), (x, shift, scale)),
            (our_gate, (x, x.flip(1), gate)),
            (our_fused("layer"), (x, x.flip(1), gate, shift, scale)),
        ):
            grads = [wide[..., dim:], wide[..., :dim]]
            found = forward_and_backward(function, inputs, grads)
            copies = [t.contiguous() for t in inputs]
            expected = forward_and_backward(function, copies, [g.contiguous() for g in grads])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert all(t.is_contiguous() for t in found[: len(found) - len(inputs)])


def test_chunks_of_a_vector_are_read_in_place(native_cpu: None) -> None:
    """No copy of a strided shift or scale: nothing but the results is allocated."""
    x = torch.randn(2, 4, 1 << 12)
    shift, scale = torch.randn(2, 6 << 12).chunk(6, dim=1)[1:3]
    with torch.profiler.profile(profile_memory=True) as profile:
        ada_layer_norm(x, shift=shift, scale=scale)
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.events())
    assert allocated < x.numel() * 4 + 1024


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_op_is_the_two_in_a_row(backend: str, dtype: torch.dtype) -> None:
    residual, x = randn(2, 11, 50, dtype=dtype), randn(2, 11, 50, dtype=dtype)
    gate, shift, scale = (randn(2, 50, dtype=dtype) for _ in range(3))
    normed, stream = our_fused("layer")(residual, x, gate, shift, scale)
    assert torch.equal(stream, our_gate(residual, x, gate))
    assert torch.equal(normed, our_norm("layer")(stream, shift, scale))


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_any_number_of_threads(
    native_cpu: None, restored_threads: None, dtype: torch.dtype
) -> None:
    batch, tokens, dim = 3, 300, 200
    residual, x, *grads = (randn(batch, tokens, dim, dtype=dtype) for _ in range(4))
    gate, shift, scale = (randn(batch, f, dim, dtype=dtype) for f in (1, 3, 300))
    affine = (randn(dim, dtype=dtype), randn(dim, dtype=dtype))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            forward_and_backward(our_fused("layer"), (residual, x, gate, shift, scale), grads)
            + forward_and_backward(our_norm("rms"), (x, shift, scale, *affine), grads)
            + forward_and_backward(our_gate, (residual, x, gate), grads)
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_capability
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty(backend: str, shape: tuple[int, int, int]) -> None:
    batch, _, dim = shape
    x = torch.randn(shape)
    gate, shift, scale = (torch.randn(batch, dim) for _ in range(3))
    for function, inputs in (
        (our_norm("layer"), (x, shift, scale, torch.randn(dim), torch.randn(dim))),
        (our_gate, (x, x, gate)),
        (our_fused("rms"), (x, x, gate, shift, scale)),
    ):
        found = forward_and_backward(function, inputs, [x, x])
        outputs = found[: len(found) - len(inputs)]
        assert all(out.shape == shape for out in outputs)
        for grad, given in zip(found[len(outputs) :], inputs, strict=True):
            assert grad.shape == given.shape
            assert (grad == 0).all()


def test_float64_goes_to_the_reference() -> None:
    x, shift, scale = (torch.randn(2, 3, 8).double() for _ in range(3))
    plan = vqkernels.explain("ada_layer_norm", x, shift=shift, scale=scale)
    assert plan.backend == "reference"
    found = forward_and_backward(our_norm("layer"), (x, shift, scale), [x])
    expected = forward_and_backward(eager_norm("layer"), (x, shift, scale), [x])
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_explain_names_the_kernel(native_cpu: None) -> None:
    x, vector = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 8)
    with vqkernels.use_backend("auto"):
        for op, tensors in (
            ("ada_layer_norm", (x, vector, vector)),
            ("gated_residual", (x, x, vector)),
            ("gated_residual_ada_layer_norm", (x, x, vector, vector, vector)),
        ):
            assert vqkernels.explain(op, *tensors).backend == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_dtypes_alone(backend: str, dtype: torch.dtype) -> None:
    """As F.layer_norm on a CPU: statistics are fp32 anyway, and results have the tokens' dtype."""
    for given in (torch.float32, dtype):
        x = randn(2, 5, 16, dtype=given)
        gate, shift, scale = (randn(2, 16, dtype=torch.float32) for _ in range(3))
        plain = our_fused("layer")(x, x, gate, shift, scale)
        with torch.autocast("cpu", dtype=dtype):
            cast = our_fused("layer")(x, x, gate, shift, scale)
            assert F.layer_norm(x, (16,)).dtype == given
            assert our_norm("rms")(x, shift, scale).dtype == given
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_no_second_derivative(backend: str) -> None:
    x = torch.randn(1, 2, 8, requires_grad=True)
    vector = torch.randn(1, 8, requires_grad=True)
    for out in (
        our_norm("layer")(x, vector, vector),
        our_gate(x, x, vector),
        our_fused("layer")(x, x, vector, vector, vector)[0],
    ):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative"):
            grad.sum().backward()
