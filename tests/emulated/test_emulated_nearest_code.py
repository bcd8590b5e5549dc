"""CUDA `nearest_code`, the source that nvcc compiles, on the CPU: float64's index for every row."""

from __future__ import annotations

import pytest
import torch
from _helpers import data, exact
from cases import Case, cases, check_nearest
from cuda_calls import HOPPER, SMALL, CudaCalls, Device
from emulator import Emulator

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NEAREST = [case for case in cases() if case.name.startswith("nearest")]
METRICS = ("l2", "dot", "cosine")
# Few columns (three products side by side), one step, a ragged step, a ragged chunk, streamed rows.
DIMS = (1, 3, 8, 16, 17, 64, 100, 256, 300)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("case", NEAREST, ids=str)
def test_in_every_order(kernels: Emulator, case: Case, order: str) -> None:
    kernels.set_order(order, seed=1)
    case.run(CudaCalls(kernels.library, kernels.declare, case.device))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", data.KINDS)
def test_every_kind_of_data(plain: CudaCalls, kind: str, dim: int) -> None:
    x, codebook = data.make(kind, 70, 300, dim)
    check_nearest(plain, x, codebook, "l2")
    if dim in (8, 64):
        for metric in ("dot", "cosine"):
            check_nearest(plain, x, codebook, metric)


@pytest.mark.parametrize("dtypes", [(FP16, FP16), (BF16, BF16), (FP16, FP32), (BF16, FP32)])
@pytest.mark.parametrize("kind", ["gaussian", "neighbours", "lattice", "offset"])
def test_half_precision(plain: CudaCalls, kind: str, dtypes: tuple) -> None:
    for dim, metric in ((4, "l2"), (8, "dot"), (40, "l2"), (40, "cosine"), (264, "l2")):
        x, codebook = data.make(kind, 70, 200, dim)
        check_nearest(plain, x.to(dtypes[0]), codebook.to(dtypes[1]), metric)


@pytest.mark.parametrize(
    ("kind", "dtype", "dim", "most"),
    [
        ("gaussian", FP32, 3, 0.02),
        ("gaussian", FP32, 8, 0.02),
        ("gaussian", FP32, 64, 0.04),
        ("gaussian", FP32, 256, 0.08),
        ("gaussian", FP16, 256, 0.02),
        ("gaussian", BF16, 64, 0.02),
        ("clustered", FP32, 64, 0.0),
        ("far_offset", FP32, 64, 0.04),  # taken out by the centre
        ("tiny", FP32, 64, 0.04),
        ("huge", FP32, 64, 0.04),
        ("minute", FP32, 64, 0.04),
        ("outlier", FP32, 64, 0.04),  # drags neither the centre nor other tiles
    ],
)
def test_the_search_decides_nearly_every_row(
    plain: CudaCalls, kind: str, dtype: torch.dtype, dim: int, most: float
) -> None:
    x, codebook = (part.to(dtype) for part in data.make(kind, 256, 512, dim))
    weighed = torch.full((256,), -7, dtype=torch.int32)
    check_nearest(plain, x, codebook, "l2", weighed=weighed)
    assert (weighed >= 0).all()
    assert (weighed > 0).float().mean() <= most


def test_near_ties_are_decided_in_float64(plain: CudaCalls) -> None:
    """Two codes are equally far: the bound must hold both back."""
    for dim in (8, 64):
        x, codebook = data.make("neighbours", 128, 512, dim)
        weighed = torch.zeros(128, dtype=torch.int32)
        check_nearest(plain, x, codebook, "l2", weighed=weighed)
        assert (weighed >= 2).all()
        assert weighed.float().mean() < 64  # slots, not the whole book


def test_the_device_changes_nothing(plain: CudaCalls) -> None:
    x, codebook = data.make("neighbours", 150, 500, 136)
    expected = plain.nearest_code(x, codebook)
    for device, splits in (
        (HOPPER, 2),
        (SMALL, 0),
        (SMALL, 4),
        (Device(multiprocessors=132), 0),
        (Device(shared_block=160 << 10), 1),
    ):
        calls = CudaCalls(plain.library, plain.declare, device)
        assert torch.equal(calls.nearest_code(x, codebook, splits=splits), expected)


@pytest.mark.parametrize("shape", [(0, 5, 8), (1, 1, 1), (1, 129, 24), (129, 1, 8), (257, 128, 16)])
def test_smallest_shapes(plain: CudaCalls, shape: tuple[int, int, int]) -> None:
    rows, codes, dim = shape
    for dtype in (FP32, FP16):
        x, codebook = (part.to(dtype) for part in data.make("gaussian", rows, codes, dim))
        check_nearest(plain, x, codebook, "l2")


def test_misaligned_halves(plain: CudaCalls) -> None:
    """Rows of halves that cp.async cannot copy go through forms, with the same result."""
    x, codebook = (part.half() for part in data.make("gaussian", 70, 200, 25))
    expected = check_nearest(plain, x[:, :24].contiguous(), codebook[:, :24].contiguous(), "l2")
    for shifted in (x[:, :24], torch.empty(70 * 24 + 1, dtype=FP16)[1:].view(70, 24)):
        shifted.copy_(x[:, :24].clone())
        assert torch.equal(check_nearest(plain, shifted, codebook[:, :24], "l2"), expected)


def test_no_matrix_of_distances(plain: CudaCalls) -> None:
    rows, codes, dim = 500, 2900, 64
    x, codebook = data.make("gaussian", rows, codes, dim)
    plain.nearest_code(x, codebook)
    forms = 2 * dim * (rows + 2944)
    terms = 16 * rows + (16 + 33) * 2944
    assert plain.scratch_bytes < 1.1 * (forms + terms) + rows * (52 + 48) < rows * codes


def test_overflowing_products(plain: CudaCalls) -> None:
    """bf16 reaches 3e38: products and norms leave fp32, finite codes are still found."""
    x, codebook = data.make("gaussian", 60, 140, 32)
    for scale in (1e30, 1e-30):
        rows, codes = (x * scale).bfloat16(), (codebook * scale).bfloat16()
        for metric in METRICS:
            indices = plain.nearest_code(rows, codes, metric)
            cost = -(rows.double() @ codes.double().T)
            if metric == "l2":
                cost = torch.cdist(rows.double() / scale, codes.double() / scale)
            if metric == "cosine":
                cost = cost / codes.double().norm(dim=-1)
            assert torch.equal(indices, cost.argmin(1))


def test_one_code_is_finite(plain: CudaCalls) -> None:
    x, codebook = data.make("gaussian", 20, 140, 16)
    codebook[:] = torch.inf
    codebook[137] = 3e38
    assert (plain.nearest_code(x, codebook) == 137).all()
    exact.assert_nearest(x, codebook, plain.nearest_code(x, codebook))


def test_the_ceiling_multiplies(kernels: Emulator) -> None:
    """Sums grow with each repeat, by numbers that fp32 holds exactly."""
    calls = CudaCalls(kernels.library, kernels.declare, Device(multiprocessors=2))
    for dtype in (FP16, BF16):
        once, products = calls.tensor_core_peak(dtype, 1)
        thrice, _ = calls.tensor_core_peak(dtype, 3)
        assert products == 2 * 8 * 16 * 16 * 8 * 16
        assert (once > 0).all()
        torch.testing.assert_close(thrice, 3 * once, rtol=1e-5, atol=0)
