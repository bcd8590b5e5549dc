"""The modulation ops and their gradients against float64, through the ops' own autograd."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from _helpers.modulation import eager_fused, eager_gate, eager_norm, randn, vector
from _helpers.precision import forward_and_backward, judge
from torch import Tensor
from torch.nn import functional as F

from vqkernels.triton import modulation_configs
from vqkernels.triton.modulation_configs import CONFIGS, RowConfig, chunk_rows, select_rows
from vqkernels.triton.modulation_rows import block_of, parts_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["layer", "rms"]
EPS = 1e-6
OPS = torch.ops.vqkernels
FILES = ("ada_layer_norm", "ada_layer_norm_backward", "gated_residual")
FILES += ("gated_residual_ada_layer_norm",)


def our_norm(norm: str) -> Callable[..., Tensor]:
    def function(x: Tensor, shift: Tensor, scale: Tensor, *affine: Tensor | None) -> Tensor:
        weight, bias = affine or (None, None)
        return OPS.ada_layer_norm(x, shift, scale, weight, bias, EPS, norm, "triton")[0]

    return function


def our_gate(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return OPS.gated_residual(residual, x, gate, "triton")


def our_fused(norm: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.gated_residual_ada_layer_norm(*tensors, EPS, norm, "triton")[:2]

    return function


@contextlib.contextmanager
def configured(change: Callable[[RowConfig], RowConfig]) -> Iterator[None]:
    """Every launch with another row of the table."""
    modules = [importlib.import_module(f"vqkernels.triton.{name}") for name in FILES]
    for module in modules:
        module.select_rows = lambda kernel, dim: change(select_rows(kernel, dim))
    try:
        yield
    finally:
        for module in modules:
            module.select_rows = modulation_configs.select_rows


def small(config: RowConfig) -> RowConfig:
    """Few rows make several chunks, the last of them short."""
    return dataclasses.replace(config, rows=2, chunk=config.chunk and 4, programs=0)


def wide(config: RowConfig) -> RowConfig:
    """Blocks of columns, as rows take that registers do not hold."""
    return dataclasses.replace(small(config), block=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("frames", [None, 3, 9])
@pytest.mark.parametrize("affine", [False, True])
def test_ada_layer_norm(affine, frames, norm, dtype):
    batch, tokens, dim = 2, 9, 37
    x, grad = randn(batch, tokens, dim, dtype=dtype) + 0.5, randn(batch, tokens, dim, dtype=dtype)
    more = (randn(dim, dtype=dtype), randn(dim, dtype=dtype)) if affine else ()
    shift, scale = vector(batch, frames, dim, dtype), vector(batch, None, dim, dtype)
    for vectors in ((shift, scale), (scale, shift), (shift, shift + 1))[: 3 if frames else 1]:
        with configured(small):
            judge(our_norm(norm), eager_norm(norm), (x, *vectors, *more), [grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [None, 1, 3, 9])
def test_gated_residual(frames, dtype):
    batch, tokens, dim = 2, 9, 37
    residual, x, grad = (randn(batch, tokens, dim, dtype=dtype) for _ in range(3))
    for change in (small, wide):
        with configured(change):
            judge(our_gate, eager_gate, (residual, x, vector(batch, frames, dim, dtype)), [grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("frames", [None, 3, 9])
def test_gated_residual_ada_layer_norm(frames, norm, dtype):
    batch, tokens, dim = 2, 9, 37
    residual, x, *grads = (randn(batch, tokens, dim, dtype=dtype) for _ in range(4))
    gate, shift = (vector(batch, frames, dim, dtype) for _ in range(2))
    scale = vector(batch, None, dim, dtype)
    for vectors in ((gate, shift, scale), (scale, gate, shift)):
        with configured(small):
            judge(our_fused(norm), eager_fused(norm), (residual, x, *vectors), grads)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 16, 33, 64, 70, 96, 160, 384, 1152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_with_the_table(dim, dtype):
    batch, tokens = 2, 5
    residual, x, *grads = (randn(batch, tokens, dim, dtype=dtype) for _ in range(4))
    gate, shift, scale = (vector(batch, None, dim, dtype) for _ in range(3))
    affine = (randn(dim, dtype=dtype), randn(dim, dtype=dtype))
    for norm in NORMS:
        judge(our_norm(norm), eager_norm(norm), (x, shift, scale, *affine), grads)
        judge(our_fused(norm), eager_fused(norm), (residual, x, gate, shift, scale), grads)
    judge(our_gate, eager_gate, (residual, x, gate), grads)


@pytest.mark.parametrize("dim", [5, 16, 37, 48])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_blocks_of_columns(dtype, norm, dim):
    batch, tokens = 2, 6
    residual, x, *grads = (randn(batch, tokens, dim, dtype=dtype) for _ in range(4))
    gate, shift, scale = (vector(batch, frames, dim, dtype) for frames in (None, 2, 6))
    affine = (randn(dim, dtype=dtype), randn(dim, dtype=dtype))
    with configured(wide):
        for vectors in ((gate, scale), (shift, gate)):
            judge(our_norm(norm), eager_norm(norm), (x, *vectors, *affine), grads)
            judge(our_norm(norm), eager_norm(norm), (x, *vectors), grads)
        judge(our_fused(norm), eager_fused(norm), (residual, x, gate, shift, scale), grads)


def test_rows_of_many_columns():
    dim = 8200
    residual, x, *grads = (torch.randn(1, 3, dim) for _ in range(4))
    gate, shift, scale = (torch.randn(1, dim) for _ in range(3))
    judge(our_fused("layer"), eager_fused("layer"), (residual, x, gate, shift, scale), grads)
    judge(our_norm("rms"), eager_norm("rms"), (x, shift, scale), grads)


def test_many_chunks():
    """More chunks than one program adds up, for vectors, weight and bias."""
    batch, tokens, dim = 1, 270, 8
    residual, x, *grads = (torch.randn(batch, tokens, dim) for _ in range(4))
    gate, shift, scale = (torch.randn(batch, dim) for _ in range(3))
    affine = (torch.randn(dim), torch.randn(dim))

    def pairs(config: RowConfig) -> RowConfig:
        return dataclasses.replace(config, rows=1, chunk=config.chunk and 2, programs=0)

    with configured(pairs):
        judge(our_norm("layer"), eager_norm("layer"), (x, shift, scale, *affine), grads)
        inputs = (residual, x, gate, shift, scale)
        judge(our_fused("layer"), eager_fused("layer"), inputs, grads)
    by_token = torch.randn(batch, tokens, dim)
    judge(our_norm("layer"), eager_norm("layer"), (x, shift, by_token, *affine), grads)
    judge(our_norm("layer"), eager_norm("layer"), (x, by_token, scale), grads)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("norm", NORMS)
def test_only_one_of_two_results_has_a_gradient(norm, kept):
    inputs = [torch.randn(2, 9, 20), torch.randn(2, 9, 20), *(torch.randn(2, 20) for _ in "123")]
    grad = torch.randn(2, 9, 20)
    leaves = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    out, true = our_fused(norm)(*leaves)[kept], eager_fused(norm)(*exact)[kept]
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    expected = torch.autograd.grad(true, exact, grad.double(), allow_unused=True)
    for mine, right in zip(found, expected, strict=True):
        if right is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_vectors_and_branch_of_another_dtype(half):
    batch, tokens, dim = 2, 9, 40
    x, grad = randn(batch, tokens, dim, dtype=half), randn(batch, tokens, dim, dtype=half)
    residual, passed = torch.randn(batch, tokens, dim), torch.randn(batch, tokens, dim)
    gate, shift, scale = (torch.randn(batch, dim) for _ in range(3))
    affine = (torch.randn(dim), torch.randn(dim))
    for ours, eager, inputs, grads in (
        (our_norm("layer"), eager_norm("layer"), (x, shift, scale, *affine), [grad]),
        (
            our_fused("rms"),
            eager_fused("rms"),
            (residual, x, gate.to(half), shift, scale.to(half)),
            [passed, passed.flip(1)],
        ),
        (our_gate, eager_gate, (x, residual, gate), [grad]),
    ):
        found = forward_and_backward(ours, inputs, grads)
        exact = forward_and_backward(
            eager, [t.double() for t in inputs], [g.double() for g in grads]
        )
        for mine, true in zip(found, exact, strict=True):
            rounding = torch.finfo(mine.dtype).eps / 2 * true.abs() + 2e-6 * true.abs().max()
            assert ((mine.double() - true).abs() <= rounding).all()
        assert [t.dtype for t in found[-len(inputs) :]] == [t.dtype for t in inputs]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers(dtype, norm):
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
    grad, branch = randn(1, 8, dim, dtype=dtype), randn(1, 8, dim, dtype=dtype)
    gate = randn(1, dim, dtype=dtype) * 0.01
    for row in range(8):
        here = slice(row, row + 1)
        judge(our_norm(norm), eager_norm(norm), (x[:, here], shift, scale), [grad[:, here]])
        inputs = (x[:, here], branch[:, here], gate, shift, scale)
        grads = [grad[:, here], grad[:, here].flip(-1)]
        judge(our_fused(norm), eager_fused(norm), inputs, grads)


@pytest.mark.parametrize("change", [small, wide])
def test_a_mean_far_above_the_deviation_costs_no_digits(change):
    """What is subtracted is the mean and what its rounding left, so only x's own digits count."""
    x = torch.randn(1, 20, 512) + 1e5
    zero = torch.zeros(1, 512)
    with configured(change):
        out = our_norm("layer")(x, zero, zero)
    exact = F.layer_norm(x.double(), (512,), eps=EPS)
    assert (out.double() - exact).abs().max() <= 2e-6


@pytest.mark.parametrize("change", [small, wide])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_in_its_row(dtype, change):
    x = randn(2, 6, 40, dtype=dtype)
    shift, scale, gate = (randn(2, 40, dtype=dtype) for _ in range(3))
    broken = torch.zeros(2, 6, dtype=torch.bool)
    with configured(change):
        clean = our_norm("layer")(x, shift, scale)
        x[0, 2, 3], x[1, 4, 0], x[1, 5, 39] = torch.nan, torch.inf, -torch.inf
        broken[0, 2] = broken[1, 4] = broken[1, 5] = True
        out = our_norm("layer")(x, shift, scale)
        normed, stream = our_fused("layer")(x, x, gate, shift, scale)
    assert out[broken].isnan().all()
    assert torch.equal(out[~broken], clean[~broken])
    assert normed[broken].isnan().all()
    assert normed[~broken].isfinite().all()
    assert (stream.isfinite() == x.isfinite()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_give_what_their_copies_give(dtype):
    batch, tokens, dim = 2, 10, 48
    shift, scale, gate, *_ = randn(batch, 6 * dim, dtype=dtype).chunk(6, dim=1)
    by_frame = randn(batch, 5, 6 * dim, dtype=dtype).chunk(6, dim=2)[1]
    wider = randn(batch, tokens, 2 * dim, dtype=dtype)
    by_column = randn(batch, dim, tokens, dtype=dtype).transpose(1, 2)
    for x in (wider[..., :dim], wider[:, :, ::2], by_column, wider[:, :1, :dim].expand(-1, 10, -1)):
        for function, inputs in (
            (our_norm("layer"), (x, shift, by_frame)),
            (our_gate, (x, x.flip(1), gate)),
            (our_fused("layer"), (x, x.flip(1), gate, by_frame, scale)),
        ):
            grads = [wider[..., dim:], wider[..., :dim]]
            found = forward_and_backward(function, inputs, grads)
            copies = [t.contiguous() for t in inputs]
            expected = forward_and_backward(function, copies, [g.contiguous() for g in grads])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert all(t.is_contiguous() for t in found[: len(found) - len(inputs)])


def test_an_expanded_gradient():
    x, shift, scale = torch.randn(2, 5, 24), torch.randn(2, 24), torch.randn(2, 24)
    grad = torch.ones(()).expand(2, 5, 24)
    judge(our_norm("layer"), eager_norm("layer"), (x, shift, scale), [grad])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_op_is_the_two_in_a_row(dtype):
    residual, x = randn(2, 11, 50, dtype=dtype), randn(2, 11, 50, dtype=dtype)
    gate, shift, scale = (randn(2, 50, dtype=dtype) for _ in range(3))
    normed, stream = our_fused("layer")(residual, x, gate, shift, scale)
    assert torch.equal(stream, our_gate(residual, x, gate))
    assert torch.equal(normed, our_norm("layer")(stream, shift, scale))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty(shape):
    batch, _, dim = shape
    x = torch.randn(shape)
    gate, shift, scale = (torch.randn(batch, dim) for _ in range(3))
    for function, inputs in (
        (our_norm("layer"), (x, shift, scale, torch.randn(dim), torch.randn(dim))),
        (our_gate, (x, x, gate)),
        (our_fused("rms"), (x, x, gate, shift, scale)),
    ):
        found = forward_and_backward(function, inputs, [x, x])
        for grad, given in zip(found[-len(inputs) :], inputs, strict=True):
            assert grad.shape == given.shape
            assert (grad == 0).all()


def test_every_width_has_a_row():
    for kernel in {config.kernel for config in CONFIGS}:
        for dim in (1, 384, 1152, 3072, 8192, 8193, 100000):
            config = select_rows(kernel, dim)
            assert config.block or dim <= config.dim


def test_parts_hold_every_width():
    for dim in (*range(1, 3000), 4096, 4097, 8192):
        parts = parts_of(dim)
        assert sum(parts) >= dim
        assert sum(parts) <= 2 * dim
        assert all(part & (part - 1) == 0 for part in parts)
        assert block_of(dim, 1024) <= max(1024, dim)
    assert [parts_of(dim) for dim in (384, 1024, 1152, 1536, 3072)] == [
        (256, 128),
        (1024,),
        (1024, 128),
        (1024, 512),
        (2048, 1024),
    ]


def test_chunks_depend_on_the_shape_alone():
    config = dataclasses.replace(select_rows("norm backward", 1152), chunk=64, programs=512)
    assert chunk_rows(config, 256, 256, 2) == 64
    assert chunk_rows(config, 256, 32, 2) == 16
    assert chunk_rows(config, 256, 1, 2) == 2
    assert chunk_rows(config, 1, 65536, 1) == 1
