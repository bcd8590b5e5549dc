"""`nearest_code` on a GPU, each backend against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from _helpers.data import KINDS, generator, make
from judging import assert_nearest
from torch import Tensor

import vqkernels
from vqkernels import nearest_code

METRICS = ("l2", "dot", "cosine")
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16, float32 book": (torch.float16, torch.float32),
    "bfloat16, float32 book": (torch.bfloat16, torch.float32),
}
N, K = 261, 515


def problem(
    device: str, rows: int, codes: int, dim: int, dtypes: str = "float32", kind: str = "gaussian"
) -> tuple[Tensor, Tensor]:
    x, codebook = make(kind, rows, codes, dim)
    x_dtype, book_dtype = DTYPES[dtypes]
    return x.to(device, x_dtype), codebook.to(device, book_dtype)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dim", [8, 64, 300])
def test_metrics_and_dtypes(gpu_backend, device, metric, dtypes, dim):
    x, codebook = problem(device, N, K, dim, dtypes)
    assert_nearest(x, codebook, nearest_code(x, codebook, metric=metric), metric)


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 3, 4, 5, 16, 17, 33, 96, 128, 256, 512])
def test_dimensions(gpu_backend, device, dim, dtypes):
    x, codebook = problem(device, N, K, dim, dtypes)
    assert_nearest(x, codebook, nearest_code(x, codebook))


@pytest.mark.parametrize("dim", [3, 8, 64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_data(gpu_backend, device, kind, dim):
    for dtypes in ("float32", "bfloat16"):
        x, codebook = problem(device, N, K, dim, dtypes, kind)
        for metric in METRICS if dtypes == "float32" else ("l2",):
            assert_nearest(x, codebook, nearest_code(x, codebook, metric=metric), metric)


@pytest.mark.parametrize(
    ("rows", "codes"), [(1, 1), (1, 300), (130, 1), (129, 257), (33, 64), (7, 20000), (1000, 4097)]
)
@pytest.mark.parametrize("dim", [3, 8, 40, 64])
def test_tails_and_splits(gpu_backend, device, rows, codes, dim):
    for dtypes in ("float32", "float16"):
        x, codebook = problem(device, rows, codes, dim, dtypes)
        assert_nearest(x, codebook, nearest_code(x, codebook))


@pytest.mark.parametrize("dim", [3, 8, 64])
@pytest.mark.parametrize("dtypes", ["float32", "float16"])
def test_equal_codes_give_the_lowest_index(gpu_backend, device, dim, dtypes):
    x, codebook = problem(device, N, 40, dim, dtypes)
    cyclic = codebook[torch.arange(5000, device=device) % 40].contiguous()
    indices = nearest_code(x, cyclic)
    assert (indices < 40).all()
    neighbours = codebook.repeat_interleave(3, 0)
    assert torch.equal(nearest_code(x, neighbours), 3 * indices)
    assert (nearest_code(x, codebook[:1].expand(3000, dim)) == 0).all()


def test_exact_ties_between_different_codes(gpu_backend, device):
    """Lattice points: every product is exact in every precision, and many distances are equal."""
    for dim in (2, 8, 48):
        x, codebook = problem(device, N, K, dim, "float16", "lattice")
        indices = nearest_code(x, codebook)
        assert_nearest(x, codebook, indices)
        distance = torch.cdist(x.double(), codebook.double()).square().round()
        best = distance.amin(1, keepdim=True)
        assert (distance.gather(1, indices[:, None]) == best).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtypes", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [3, 8, 64, 300])
def test_not_a_number(gpu_backend, device, metric, dtypes, dim):
    x, codebook = problem(device, N, K, dim, dtypes)
    x[3, 1], x[5, 0], x[7, 2] = torch.nan, torch.inf, -torch.inf
    x[9] = 0
    codebook[0, 1], codebook[17, 0], codebook[-1, 2] = torch.nan, torch.inf, -torch.inf
    codebook[40] = 0
    indices = nearest_code(x, codebook, metric=metric)
    assert not torch.isin(indices, torch.tensor([0, 17, K - 1], device=device)).any()
    assert_nearest(x, codebook, indices, metric)


@pytest.mark.parametrize("dim", [3, 64])
@pytest.mark.parametrize("codes", [30, 20000])
def test_book_without_a_finite_code(gpu_backend, device, dim, codes):
    x, codebook = problem(device, 20, codes, dim)
    codebook[:, 0] = torch.nan
    assert (nearest_code(x, codebook) == -1).all()


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [3, 8, 64, 300])
def test_codes_whose_squared_norm_overflows(gpu_backend, device, dim, dtypes):
    """A code that is finite can be chosen; the bound leaves open which of several so long ones."""
    x, codebook = problem(device, N, 90, dim, dtypes)
    far = (codebook.float().sign() * 3e30).to(codebook.dtype)
    assert (nearest_code(x, far[:1]) == 0).all()
    indices = nearest_code(x, far)
    assert ((indices >= 0) & (indices < 90)).all()
    broken = far[:3].clone()
    broken[0, 0], broken[2, 0] = torch.nan, torch.inf
    assert (nearest_code(x, broken) == 1).all()


def test_with_a_packed_book(gpu_backend, device):
    """A GPU has nothing to prepare ahead: whatever `pack_codebook` returns, it is accepted."""
    x, codebook = problem(device, N, 90, 24)
    with vqkernels.use_backend("auto"):
        packed = vqkernels.pack_codebook(codebook)
    assert packed.device == codebook.device
    assert torch.equal(nearest_code(x, codebook, packed=packed), nearest_code(x, codebook))


def test_empty(gpu_backend, device):
    codebook = torch.randn(10, 8, device=device)
    assert nearest_code(torch.empty(0, 8, device=device), codebook).shape == (0,)
    assert nearest_code(torch.empty(3, 0, 8, device=device), codebook).shape == (3, 0)


@pytest.mark.parametrize("dtypes", ["float32", "float16"])
def test_strides(gpu_backend, device, dtypes):
    x, codebook = problem(device, 2 * 5 * 7, 90, 24, dtypes)
    expected = nearest_code(x, codebook)
    assert_nearest(x, codebook, expected)
    grid = x.view(2, 5, 7, 24)
    channel_first = grid.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(nearest_code(channel_first, codebook).flatten(), expected)
    wide = torch.zeros(2, 5, 14, 48, dtype=x.dtype, device=device)
    wide[:, :, ::2, ::2] = grid
    assert torch.equal(nearest_code(wide[:, :, ::2, ::2], codebook).flatten(), expected)
    strided_book = torch.zeros(24, 180, dtype=codebook.dtype, device=device)
    strided_book[:, ::2] = codebook.T
    assert torch.equal(nearest_code(x, strided_book[:, ::2].T), expected)
    unaligned = torch.zeros(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x).copy_(x)
    assert torch.equal(nearest_code(unaligned, codebook), expected)
    four_levels = torch.zeros(4, 10, 2, 14, 24, dtype=x.dtype, device=device)
    four_levels[::2, ::2, :1, ::2] = grid[:, :, None]
    assert torch.equal(nearest_code(four_levels[::2, ::2, :1, ::2], codebook).flatten(), expected)


@pytest.mark.parametrize("dim", [3, 40, 64])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_books(gpu_backend, device, dim, lead):
    groups, rows, codes = 3, 25, 70
    x = torch.randn(*lead, groups, rows, dim, generator=generator(2)).to(device)
    codebook = torch.randn(groups, codes, dim, generator=generator(3)).to(device)
    indices = nearest_code(x, codebook)
    assert indices.shape == x.shape[:-1]
    for g in range(groups):
        flat = x.select(-3, g).reshape(-1, dim)
        assert_nearest(flat, codebook[g], indices.select(-2, g).reshape(-1))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dim", [8, 64, 256])
def test_backends_agree(device, dim, dtypes):
    """Rows of integers, which all products hold exactly: no rounding, and one answer."""
    x, codebook = (torch.randint(-8, 9, (n, dim), generator=generator(n)) for n in (1030, 700))
    x_dtype, book_dtype = DTYPES[dtypes]
    x, codebook = x.to(device, x_dtype), codebook.to(device, book_dtype)
    with vqkernels.use_backend("reference"):
        expected = nearest_code(x, codebook)
    served = 0
    for backend in ("cpu", "triton", "cuda"):
        try:
            with vqkernels.use_backend(backend):
                found = nearest_code(x, codebook)
        except ValueError:  # not built, or not for this device
            continue
        served += 1
        distance = torch.cdist(x.double(), codebook.double()).square().round()
        best = distance.gather(1, expected[:, None])
        assert torch.equal(distance.gather(1, found[:, None]), best), backend
        unique = (distance == best).sum(1) == 1
        assert unique.any()
        assert torch.equal(found[unique], expected[unique]), backend
    assert served, "no backend of ours serves this device"


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "codes", "dim"), [(5000, 3000, 64), (4, 50000, 64), (999, 900, 8)]
)
def test_two_runs_give_the_same_bits(gpu_backend, device, rows, codes, dim, dtypes):
    x, codebook = problem(device, rows, codes, dim, dtypes, "neighbours")
    first = nearest_code(x, codebook)
    for _ in range(3):
        assert torch.equal(nearest_code(x, codebook), first)


def test_large_books_in_splits(gpu_backend, device):
    """Few rows against many codes: K is searched in parts, whose ties go to the first part."""
    x, codebook = problem(device, 5, 1000, 64)
    book = codebook.repeat(60, 1)
    indices = nearest_code(x, book)
    assert (indices < 1000).all()
    assert torch.equal(indices, nearest_code(x, codebook))
    assert_nearest(x, book, indices)


@pytest.mark.parametrize("dtypes", ["float32", "float16"])
@pytest.mark.parametrize("dim", [8, 64, 256])
def test_every_launch_of_the_cuda_search(device, only_cuda, dim, dtypes):
    """The choices that `vqkernels.cuda` offers change nothing but the time."""
    from vqkernels import cuda, native

    if native.cuda_problem is not None:
        pytest.skip(native.cuda_problem)
    x, codebook = problem(device, 700, 3000, dim, dtypes)
    served = 0
    for splits, block_rows, stages in itertools.product((0, 1, 3), (0, 128, 256), (0, 2, 3)):
        choices = {"splits": splits, "block_rows": block_rows, "stages": stages}
        try:
            found = cuda.nearest_code(x, codebook, **choices)
        except RuntimeError:  # more shared memory than this GPU has, which a choice may ask for
            if block_rows == stages == 0:
                raise
            continue
        assert_nearest(x, codebook, found)
        served += 1
    assert served >= 6


def test_the_ceiling_is_plausible(device, only_cuda):
    from vqkernels import cuda, native

    if native.cuda_problem is not None:
        pytest.skip(native.cuda_problem)
    for dtype in (torch.float16, torch.bfloat16):
        rate = cuda.tensor_core_peak(device, dtype)
        assert 1e13 < rate < 1e16
