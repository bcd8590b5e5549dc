"""CUDA `quantize` and its gradients, the source that nvcc compiles, on the CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from _helpers import data
from cases import Case, cases, check_quantize
from cuda_calls import CudaCalls
from emulator import Emulator

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
QUANTIZE = [case for case in cases() if case.name.startswith(("quantize", "book"))]


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("case", QUANTIZE, ids=str)
def test_in_every_order(kernels: Emulator, case: Case, order: str) -> None:
    kernels.set_order(order, seed=2)
    case.run(CudaCalls(kernels.library, kernels.declare, case.device))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("dim", [1, 3, 4, 8, 33, 64, 130])
def test_dims(plain: CudaCalls, dim: int, gradient: str) -> None:
    """One element or a piece of four at a time, four to 32 threads a row."""
    for dtypes in ((FP32, FP32), (FP16, FP16), (BF16, FP32)):
        generator = data.generator(dim)
        x = torch.randn(101, dim, generator=generator).to(dtypes[0])
        codebook = torch.randn(37, dim, generator=generator).to(dtypes[1])
        check_quantize(plain, x, codebook, gradient=gradient)


def test_strides_and_masks(plain: CudaCalls) -> None:
    x = torch.randn(2, 12, 5, 7, generator=data.generator(0)).permute(0, 2, 3, 1)
    codebook = torch.randn(20, 24, generator=data.generator(1))[:, ::2]
    for metric, keep in itertools.product(("l2", "cosine"), (0.0, 0.5, 1.0)):
        mask = torch.rand(x.shape[:-1], generator=data.generator(2)) < keep
        check_quantize(plain, x, codebook, metric, mask, "rotation")


def test_no_rows(plain: CudaCalls) -> None:
    x, codebook = torch.empty(0, 8), torch.ones(5, 8)
    quantized, indices, commitment, codebook_loss, counts = plain.quantize(x, codebook)
    assert quantized.shape == (0, 8)
    assert indices.shape == (0,)
    assert (float(commitment), float(codebook_loss)) == (0, 0)
    assert torch.equal(counts, torch.zeros(5))
    grad = plain.quantize_backward_codebook(torch.tensor(1.0), x, codebook, indices)
    assert torch.equal(grad, torch.zeros(5, 8))


def test_the_order_of_threads_changes_no_bit(kernels: Emulator) -> None:
    x, codebook = data.make("gaussian", 500, 9, 12)
    calls = CudaCalls(kernels.library, kernels.declare)
    results = []
    for order in ("forward", "reverse", "shuffled"):
        kernels.set_order(order, seed=5)
        output = calls.quantize(x, codebook)
        grad = calls.quantize_backward_codebook(torch.tensor(1.0), x, codebook, output[1])
        results.append([*output, grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
