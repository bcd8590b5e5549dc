"""Gathering, sums over codes, and `quantize` with its gradients, against the reference."""

from __future__ import annotations

import pytest
import torch
from books import judge

from vqkernels.reference import code_statistics as reference_statistics
from vqkernels.reference import gather_codes as reference_gather
from vqkernels.reference import quantize as reference_quantize
from vqkernels.triton import (
    code_statistics,
    gather_codes,
    quantize,
    quantize_backward_codebook,
    quantize_backward_x,
)
from vqkernels.triton.segment_sum import CHUNK

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(*shape: int, below: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, below, shape, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 17, 64, 300])
def test_gather(dtype, dim):
    codebook = random(40, dim, dtype=dtype)
    indices = labels(7, 11, below=40)
    result = gather_codes(codebook, indices)
    assert torch.equal(result, reference_gather.gather_codes(codebook, indices))
    transposed = codebook.T.contiguous().T
    assert torch.equal(gather_codes(transposed, indices.T.contiguous().T), result)


def test_gather_from_books():
    codebook, indices = random(3, 20, 5), labels(2, 3, 9, below=20)
    expected = reference_gather.gather_codes(codebook, indices)
    assert torch.equal(gather_codes(codebook, indices), expected)
    assert gather_codes(codebook, indices[:, :, :0]).shape == (2, 3, 0, 5)


def test_gather_outside_the_book_gives_zeros():
    codebook = random(4, 8)
    indices = torch.tensor([-1, -7, 4, 1 << 40, 3])
    result = gather_codes(codebook, indices)
    assert (result[:4] == 0).all()
    assert torch.equal(result[4], codebook[3])


def close(actual: torch.Tensor, expected: torch.Tensor, rows: int) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * rows**0.5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (37, 50), (300, 7), (3 * CHUNK + 5, 2)])
@pytest.mark.parametrize("dim", [1, 3, 17, 130])
def test_statistics(rows, codes, dim, weighted):
    x, indices = random(rows, dim), labels(rows, below=codes)
    weights = random(rows, seed=1).abs() if weighted else None
    counts, sums = code_statistics(x, indices, codes, weights, 0)
    expected = reference_statistics.code_statistics(x, indices, codes, weights)
    close(counts, expected[0], rows)
    close(sums, expected[1], rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_a_collapsed_book(dtype):
    rows = 5 * CHUNK + 3
    x = random(rows, 20, dtype=dtype)
    indices = torch.full((rows,), 2)
    counts, sums = code_statistics(x, indices, 4, None, 0)
    assert counts.tolist() == [0, 0, rows, 0]
    close(sums[2], x.double().sum(0).float(), rows)
    assert (sums[[0, 1, 3]] == 0).all()
    again = code_statistics(x, indices, 4, None, 0)
    assert torch.equal(again[1], sums)


def test_statistics_of_books_and_strides():
    x = random(2, 6, 3, 9).permute(0, 2, 3, 1)  # [B, G, N, D], channel first
    indices = labels(2, 3, 9, below=8)
    weights = random(3, 2, 9, seed=3).abs().transpose(0, 1)
    counts, sums = code_statistics(x, indices, 8, weights, 3)
    expected = reference_statistics.code_statistics(x, indices, 8, weights, books=3)
    close(counts, expected[0], 9)
    close(sums, expected[1], 9)


def test_statistics_of_an_expanded_gradient():
    indices = labels(50, below=6)
    grad = torch.ones(()).expand(50, 4)
    counts, sums = code_statistics(grad, indices, 6, None, 0)
    assert torch.equal(sums, counts[:, None].expand(6, 4))


def test_statistics_skip_what_is_outside():
    x = random(5, 4)
    indices = torch.tensor([0, -1, 7, -3, 1])
    counts, sums = code_statistics(x, indices, 2, None, 0)
    assert counts.tolist() == [1, 1]
    assert torch.equal(sums, x[[0, 4]])
    counts, sums = code_statistics(x[:0], indices[:0], 2, None, 0)
    assert (counts == 0).all()
    assert (sums == 0).all()


def test_an_infinity_stays_with_its_code():
    x = random(4 * CHUNK, 4)
    indices = torch.arange(4 * CHUNK) // CHUNK
    x[CHUNK + 3, 1] = float("inf")
    _, sums = code_statistics(x, indices, 4, None, 0)
    assert sums[1, 1] == float("inf")
    sums[1, 1] = 0
    assert sums.isfinite().all()


@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_quantize(metric, dtype, masked):
    x, codebook = random(70, 24, dtype=dtype), random(50, 24, seed=1, dtype=dtype)
    x[4, 3], x[6, 2] = float("nan"), float("inf")
    mask = None
    if masked:
        mask = torch.rand(70, generator=torch.Generator().manual_seed(2)) > 0.3
        mask[4], mask[6] = False, True
    _compare_quantize(x, codebook, metric, mask)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_quantize_halves_with_a_float_book(dtype):
    _compare_quantize(random(40, 3, dtype=dtype), random(20, 3, seed=1), "l2", None)
    _compare_quantize(random(40, 150, dtype=dtype), random(20, 150, seed=1), "l2", None)


def test_quantize_books_and_strides():
    x = random(2, 6, 3, 9).permute(0, 2, 3, 1)  # [B, G, N, D]
    mask = torch.rand(3, 2, 9, generator=torch.Generator().manual_seed(2)).transpose(0, 1) > 0.2
    _compare_quantize(x, random(3, 20, 6, seed=1), "l2", mask)
    channel_first = random(2, 5, 4, 7).permute(0, 2, 3, 1)
    _compare_quantize(channel_first, random(30, 5, seed=1), "l2", None)
    wide = random(4, 6, 4, 6, 8)[::2, ::2, ::2, ::2]
    _compare_quantize(wide, random(30, 8, seed=1), "l2", None)


def _compare_quantize(x, codebook, metric, mask):
    quantized, indices, commitment, codebook_loss, counts = quantize(
        x, codebook, metric, mask, "straight_through", None
    )
    if codebook.dim() == 2:
        kept = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
        assert (indices[~kept] == -1).all()
        judge(indices[kept], x[kept], codebook, metric)
    expected = reference_quantize.quantize(x, codebook, metric=metric, mask=mask)
    assert quantized.dtype == x.dtype
    assert quantized.stride() == torch.empty_like(x).stride()
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(quantized, expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(counts, expected[4])
    for loss in (commitment, codebook_loss):
        torch.testing.assert_close(loss, expected[2], rtol=1e-5, atol=0)
    assert commitment.data_ptr() != codebook_loss.data_ptr()


def test_quantize_nothing():
    x, codebook = random(6, 8), random(5, 8, seed=1)
    nothing = torch.zeros(6, dtype=torch.bool)
    quantized, indices, commitment, _, counts = quantize(x, codebook, "l2", nothing, "none", None)
    assert (indices == -1).all()
    assert (quantized == 0).all()
    assert (counts == 0).all()
    assert commitment == 0
    empty = quantize(x[:0], codebook, "l2", None, "none", None)
    assert empty[0].shape == (0, 8)
    assert empty[2] == 0
    assert empty[4].shape == (5,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 17, 150])
@pytest.mark.parametrize("gradient", ["straight_through", "none"])
@pytest.mark.parametrize("given", ["both", "quantized", "commitment"])
def test_gradient_of_x(dtype, dim, gradient, given):
    x, codebook = random(45, dim, dtype=dtype), random(20, dim, seed=1, dtype=dtype)
    indices = labels(45, below=20)
    x[indices == -1] = float("nan")
    grad_quantized = random(45, dim, seed=4, dtype=dtype) if given != "commitment" else None
    grad_commitment = torch.tensor(37.5) if given != "quantized" else None
    arguments = (grad_quantized, grad_commitment, x, codebook, indices)
    grad = quantize_backward_x(*arguments, gradient)
    expected = reference_quantize.quantize_backward_x(*arguments, gradient=gradient)
    assert grad.dtype == dtype
    assert (grad[indices == -1] == 0).all()
    steps = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(grad, expected, rtol=steps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 17, 150])
@pytest.mark.parametrize("given", ["both", "quantized", "commitment"])
def test_rotated_gradient_of_x(dtype, dim, given):
    x, codebook = random(45, dim, dtype=dtype), random(20, dim, seed=1, dtype=dtype)
    indices = labels(45, below=20)
    x[indices == -1] = float("nan")
    x[:3], indices[:3] = 0, torch.tensor([3, 4, 5])  # no direction
    codebook[4] = 0
    x[3], indices[3] = -codebook[7] * (1 + 2**-8), 7  # all but opposite
    grad_quantized = random(45, dim, seed=4, dtype=dtype) if given != "commitment" else None
    grad_commitment = torch.tensor(37.5) if given != "quantized" else None
    arguments = (grad_quantized, grad_commitment, x, codebook, indices)
    grad = quantize_backward_x(*arguments, "rotation")
    expected = reference_quantize.quantize_backward_x(*arguments, gradient="rotation")
    assert grad.dtype == dtype
    assert (grad[indices == -1] == 0).all()
    # Both are sums in float64: they differ by the last rounding only.
    steps = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(grad, expected, rtol=steps, atol=1e-7)


def test_rotated_gradient_of_x_with_books_and_strides():
    x = random(2, 6, 3, 9).permute(0, 2, 3, 1)
    codebook, indices = random(3, 20, 6, seed=1), labels(2, 3, 9, below=20)
    for grad_quantized in (random(2, 3, 9, 6, seed=4), torch.ones(()).expand(2, 3, 9, 6)):
        arguments = (grad_quantized, torch.tensor(2.0), x, codebook, indices)
        grad = quantize_backward_x(*arguments, "rotation")
        expected = reference_quantize.quantize_backward_x(*arguments, gradient="rotation")
        torch.testing.assert_close(grad, expected)


def test_gradient_of_x_with_books_and_strides():
    x = random(2, 6, 3, 9).permute(0, 2, 3, 1)
    codebook, indices = random(3, 20, 6, seed=1), labels(2, 3, 9, below=20)
    for grad_quantized in (random(2, 3, 9, 6, seed=4), torch.ones(()).expand(2, 3, 9, 6)):
        arguments = (grad_quantized, torch.tensor(2.0), x, codebook, indices)
        grad = quantize_backward_x(*arguments, "straight_through")
        expected = reference_quantize.quantize_backward_x(*arguments, gradient="straight_through")
        assert grad.stride() == torch.empty_like(x).stride()
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "codes"), [(45, 20), (3 * CHUNK + 9, 2)])
def test_gradient_of_the_book(dtype, rows, codes):
    x, codebook = random(rows, 17, dtype=dtype), random(codes, 17, seed=1, dtype=dtype)
    indices = labels(rows, below=codes)
    x[indices == -1] = float("nan")
    arguments = (torch.tensor(37.5), x, codebook, indices)
    grad = quantize_backward_codebook(*arguments)
    expected = reference_quantize.quantize_backward_codebook(*arguments)
    assert grad.dtype == dtype
    steps = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(grad, expected, rtol=steps, atol=2e-6)
    assert torch.equal(quantize_backward_codebook(*arguments), grad)


def test_gradient_of_books():
    x = random(2, 6, 3, 9).permute(0, 2, 3, 1)
    codebook, indices = random(3, 20, 6, seed=1), labels(2, 3, 9, below=20)
    arguments = (torch.tensor(2.0), x, codebook, indices)
    expected = reference_quantize.quantize_backward_codebook(*arguments)
    torch.testing.assert_close(quantize_backward_codebook(*arguments), expected)
