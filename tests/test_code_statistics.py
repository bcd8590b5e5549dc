"""`code_statistics`: counts and sums a code, accurate over long sums and deterministic."""

from __future__ import annotations

import math

import pytest
import torch
from _helpers.data import generator
from torch import Tensor

from vqkernels import code_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
every_capability = pytest.mark.every_capability
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expected_statistics(
    x: Tensor, indices: Tensor, codes: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, sums and sums of magnitudes in float64, for one book."""
    labels = indices.flatten()
    used = labels >= 0
    weight = torch.ones(len(labels)) if weights is None else weights.flatten()
    weight = weight[used].double()
    rows = x.reshape(-1, x.shape[-1])[used].double() * weight[:, None]
    counts = torch.zeros(codes, dtype=torch.float64).index_add_(0, labels[used], weight)
    sums = torch.zeros(codes, x.shape[-1], dtype=torch.float64)
    return (
        counts,
        sums.index_add(0, labels[used], rows),
        sums.index_add(0, labels[used], rows.abs()),
    )


def assert_statistics(
    x: Tensor, indices: Tensor, codes: int, weights: Tensor | None = None
) -> None:
    counts, sums = code_statistics(x, indices, codes, weights)
    assert counts.dtype == sums.dtype == torch.float32
    assert counts.shape == (codes,)
    assert sums.shape == (codes, x.shape[-1])
    true_counts, true_sums, magnitudes = expected_statistics(x, indices, codes, weights)
    torch.testing.assert_close(counts.double(), true_counts, rtol=1e-6, atol=1e-30)
    # One rounding of each product with its weight, one of the result.
    assert ((sums.double() - true_sums).abs() <= 2.0**-22 * magnitudes).all()


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("rows", "codes", "dim"),
    [(0, 3, 2), (1, 1, 1), (50, 7, 3), (300, 20, 64), (200, 9, 65), (500, 30, 150), (900, 2, 5)],
)
def test_statistics(
    backend: str, rows: int, codes: int, dim: int, weighted: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, dim).to(dtype)
    indices = torch.randint(-1, codes, (rows,), generator=generator(rows))
    weights = torch.rand(rows).to(dtype) - 0.2 if weighted else None
    assert_statistics(x, indices, codes, weights)


@every_capability
def test_weights_of_zero_and_codes_without_rows(backend: str) -> None:
    x, indices = torch.randn(4, 3), torch.tensor([0, 0, 2, -1])
    counts, sums = code_statistics(x, indices, 5, torch.tensor([0.0, 2.0, 0.0, 7.0]))
    assert torch.equal(counts, torch.tensor([2.0, 0, 0, 0, 0]))
    expected = torch.zeros(5, 3)
    expected[0] = x[1] * 2
    assert torch.equal(sums, expected)


@every_capability
def test_skipped_rows_may_hold_anything(backend: str) -> None:
    x = torch.tensor([[math.nan, math.inf], [1.0, 2.0], [-math.inf, 3.0]])
    counts, sums = code_statistics(x, torch.tensor([-1, 1, -1]), 2)
    assert torch.equal(counts, torch.tensor([0.0, 1.0]))
    assert torch.equal(sums, torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    counts, sums = code_statistics(x, torch.full((3,), -1), 2)
    assert not counts.any()
    assert not sums.any()


@every_capability
def test_infinities_stay_in_their_sums(backend: str) -> None:
    x = torch.tensor([[math.inf, 1.0], [1.0, 1.0], [math.nan, 1.0], [1.0, 1.0]])
    _, sums = code_statistics(x, torch.tensor([0, 0, 1, 1]), 3)
    assert sums[0, 0] == math.inf
    assert sums[1, 0].isnan()
    assert torch.equal(sums[:, 1], torch.tensor([2.0, 2.0, 0.0]))


@every_capability
@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_a_long_sum_is_as_good_as_a_short_one(backend: str, offset: float) -> None:
    x = torch.randn(1_000_000, 2) + offset
    indices = torch.zeros(1_000_000, dtype=torch.int64)
    counts, sums = code_statistics(x, indices, 2)
    exact = x.double().sum(0)
    assert counts[0] == 1_000_000
    assert ((sums[0].double() - exact).abs() <= 1e-6 * exact.abs() + 1e-4).all()


@every_capability
def test_counts_beyond_the_integers_of_fp32(native_cpu: None) -> None:
    """A running fp32 count would stop at 2^24."""
    indices = torch.zeros(1, dtype=torch.int64).expand((1 << 24) + 4)
    x = torch.ones(1, 1).expand((1 << 24) + 4, 1)
    counts, sums = code_statistics(x, indices, 1)
    assert counts.item() == sums.item() == (1 << 24) + 4


@every_capability
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize("books", [1, 2, 3])
def test_groups(backend: str, books: int, leading: tuple[int, ...], weighted: bool) -> None:
    x = torch.randn(*leading, books, 11, 4)
    indices = torch.randint(-1, 5, x.shape[:-1], generator=generator(1))
    weights = torch.rand(x.shape[:-1]) if weighted else None
    counts, sums = code_statistics(x, indices, 5, weights, books=books)
    assert counts.shape == (books, 5)
    assert sums.shape == (books, 5, 4)
    for book in range(books):
        own = None if weights is None else weights.select(-2, book)
        expected = code_statistics(x.select(-3, book), indices.select(-2, book), 5, own)
        assert torch.equal(counts[book], expected[0])
        assert torch.equal(sums[book], expected[1])


@every_capability
def test_layouts(backend: str) -> None:
    x = torch.randn(4, 70, 9, 5).permute(0, 2, 3, 1)
    indices = torch.randint(-1, 6, (5, 9, 4), generator=generator(2)).permute(2, 1, 0)
    weights = torch.rand(9, 4, 5).permute(1, 0, 2)
    dense = code_statistics(x.contiguous(), indices.contiguous(), 6, weights.contiguous())
    strided = code_statistics(x, indices, 6, weights)
    assert torch.equal(dense[0], strided[0])
    assert torch.equal(dense[1], strided[1])
    assert_statistics(x, indices, 6, weights)
    assert_statistics(torch.randn(5, 3).expand(7, 5, 3), torch.zeros(7, 5, dtype=torch.int64), 2)


@every_capability
def test_same_bits_on_any_number_of_threads(backend: str, restored_threads: None) -> None:
    x = torch.randn(5000, 300) * 10 ** torch.randn(5000, 1)
    indices = torch.randint(-1, 40, (5000,), generator=generator(3))
    weights = torch.rand(5000)
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(code_statistics(x, indices, 40, weights))
    for counts, sums in found[1:]:
        assert torch.equal(counts, found[0][0])
        assert torch.equal(sums, found[0][1])


@pytest.mark.parametrize("wrong", [-2, 5, 1 << 40])
def test_index_out_of_range(backend: str, wrong: int) -> None:
    indices = torch.zeros(20, dtype=torch.int64)
    indices[7] = wrong
    with pytest.raises(IndexError, match=r"\[-1, 4\]"):
        code_statistics(torch.randn(20, 3), indices, 5)


def test_float64_goes_to_the_reference() -> None:
    x, indices = torch.randn(30, 3).double(), torch.randint(4, (30,), generator=generator(4))
    assert_statistics(x, indices, 4)


def test_statistics_have_no_gradient(backend: str) -> None:
    x = torch.randn(5, 3, requires_grad=True)
    _, sums = code_statistics(x, torch.zeros(5, dtype=torch.int64), 2)
    with pytest.raises(NotImplementedError, match="detach"):
        sums.sum().backward()


BAD_CALLS = {
    "x of rank 1": (lambda x, i: code_statistics(x[0], i, 3), ValueError, r"x must be \[\.\.\., N"),
    "integer x": (lambda x, i: code_statistics(x.int(), i, 3), TypeError, "x must.*int32"),
    "list": (lambda x, i: code_statistics([1.0], i, 3), TypeError, "x must.*list"),
    "indices of another shape": (
        lambda x, i: code_statistics(x, i[:3], 3),
        ValueError,
        r"indices.*\[5\].*\[3\]",
    ),
    "float indices": (lambda x, i: code_statistics(x, i.float(), 3), TypeError, "indices.*int64"),
    "no codes": (lambda x, i: code_statistics(x, i, 0), ValueError, "codebook_size.*0"),
    "negative codes": (lambda x, i: code_statistics(x, i, -3), ValueError, "codebook_size.*-3"),
    "weights of another shape": (
        lambda x, i: code_statistics(x, i, 3, x),
        ValueError,
        r"weights.*\[5\].*\[5, 4\]",
    ),
    "integer weights": (lambda x, i: code_statistics(x, i, 3, i), TypeError, "weights.*int64"),
    "two devices": (
        lambda x, i: code_statistics(x, i.to("meta"), 3),
        ValueError,
        "device.*meta",
    ),
    "weights elsewhere": (
        lambda x, i: code_statistics(x, i, 3, torch.ones(5, device="meta")),
        ValueError,
        "weights.*device.*meta",
    ),
    "wrong books": (
        lambda x, i: code_statistics(x.expand(3, 5, 4), i.expand(3, 5), 3, books=2),
        ValueError,
        r"books=2.*\[3, 5, 4\]",
    ),
    "books without groups": (
        lambda x, i: code_statistics(x, i, 3, books=5),
        ValueError,
        "x must be",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(backend: str, case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
