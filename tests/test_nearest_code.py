"""`nearest_code` is exact on hard data, and a row's answer is its own."""

from __future__ import annotations

import pytest
import torch
from _helpers.data import KINDS, generator, make
from _helpers.exact import allowed_regret, assert_nearest, first_of_equals, regret

import vqkernels
from vqkernels import nearest_code, pack_codebook

METRICS = ("l2", "dot", "cosine")
DIMS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 64, 100, 256)
BOOKS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 300, 1000)
ROWS = (0, 1, 2, 3, 4, 7, 13, 14, 15, 29, 64, 225)
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16 and float32": (torch.float16, torch.float32),
    "bfloat16 and float32": (torch.bfloat16, torch.float32),
}

pytestmark = pytest.mark.usefixtures("one_thread")
every_capability = pytest.mark.every_capability


# ---- exactness -----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_nearest_in_float64(backend: str, kind: str, dim: int) -> None:
    x, codebook = make(kind, 29, 300, dim)
    for metric in METRICS:
        assert_nearest(x, codebook, nearest_code(x, codebook, metric=metric), metric)


@every_capability
@pytest.mark.parametrize("dim", [1, 4, 8, 9, 32, 33, 100, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows(native_cpu: None, kind: str, dim: int) -> None:
    """Enough rows that the book is packed once and a low-precision screen may be chosen."""
    x, codebook = make(kind, 230, 90, dim, seed=1)
    for metric in METRICS:
        found = nearest_code(x, codebook, metric=metric)
        assert_nearest(x, codebook, found, metric)
        packed = pack_codebook(codebook, metric=metric)
        assert torch.equal(nearest_code(x, codebook, metric=metric, packed=packed), found)


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [3, 8, 9, 33, 64])
def test_ragged_sizes(backend: str, dim: int, metric: str) -> None:
    x, codebook = make("gaussian", max(ROWS), max(BOOKS), dim)
    for codes in BOOKS:
        for rows in ROWS:
            found = nearest_code(x[:rows], codebook[:codes], metric=metric)
            assert_nearest(x[:rows], codebook[:codes], found, metric)


@pytest.mark.parametrize("kind", ["gaussian", "tiny", "offset", "clustered", "lognormal"])
@pytest.mark.parametrize("shape", [(300, 256, 2048), (500, 64, 5000), (700, 8, 9000)])
def test_books_of_many_blocks(native_cpu: None, kind: str, shape: tuple[int, int, int]) -> None:
    rows, dim, codes = shape
    x, codebook = make(kind, rows, codes, dim)
    assert_nearest(x, codebook, nearest_code(x, codebook))


@every_capability
@pytest.mark.parametrize("dim", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_large_books_of_few_dimensions(native_cpu: None, kind: str, dim: int) -> None:
    """Where a tree over the codes pays, since the book was packed before."""
    x, codebook = make(kind, 60, 2100, dim, seed=3)
    for metric in METRICS:
        packed = pack_codebook(codebook, metric=metric)
        found = nearest_code(x, codebook, metric=metric, packed=packed)
        assert_nearest(x, codebook, found, metric)
        assert torch.equal(nearest_code(x, codebook, metric=metric), found)


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize("kind", ["gaussian", "duplicated", "lattice", "tiny"])
def test_many_rows_and_codes_of_few_dimensions(
    native_cpu: None, kind: str, dim: int, metric: str
) -> None:
    """Where a tree pays although it has to be made first."""
    x, codebook = make(kind, 4200, 2100, dim, seed=3)
    packed = pack_codebook(codebook, metric=metric)
    found = nearest_code(x, codebook, metric=metric)
    assert torch.equal(nearest_code(x, codebook, metric=metric, packed=packed), found)
    some = torch.arange(7, 4200, 42)
    assert_nearest(x[some], codebook, found[some], metric)


@every_capability
@pytest.mark.parametrize("metric", METRICS)
def test_large_books_with_what_is_no_number(native_cpu: None, metric: str) -> None:
    for dim in (2, 4):
        x, codebook = make("gaussian", 300, 3000, dim)
        x[5], x[6, 0], x[7, 1] = float("nan"), float("inf"), float("-inf")
        codebook[::3, 1] = float("nan")
        codebook[1::3, 0] = float("inf")
        codebook[2] = 1e38
        codebook[5] = -1e25
        codebook[8] = 0
        codebook[2999] = codebook[11]
        packed = pack_codebook(codebook, metric=metric)
        found = nearest_code(x, codebook, metric=metric, packed=packed)
        assert torch.equal(found, nearest_code(x, codebook, metric=metric))
        assert (found[5:8] == -1).all()
        rest = torch.cat([torch.arange(5), torch.arange(8, 300)])
        assert (found[rest] % 3 == 2).all()
        assert_nearest(x[rest], codebook, found[rest], metric)
        hopeless = torch.full((3000, dim), float("nan"))
        packed = pack_codebook(hopeless, metric=metric)
        assert (nearest_code(x, hopeless, metric=metric, packed=packed) == -1).all()


@every_capability
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 4, 7, 8, 9, 16, 33, 64, 100])
def test_dtypes(backend: str, dim: int, metric: str, dtypes: str) -> None:
    x_dtype, book_dtype = DTYPES[dtypes]
    for kind in ("gaussian", "tiny", "offset", "duplicated"):
        for rows in (5, 230):
            x, codebook = make(kind, rows, 150, dim)
            x, codebook = x.to(x_dtype), codebook.to(book_dtype)
            assert_nearest(x, codebook, nearest_code(x, codebook, metric=metric), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_float64_goes_to_the_reference(metric: str) -> None:
    """Differences that fp32 cannot hold decide here."""
    x, codebook = make("gaussian", 50, 40, 6)
    x, codebook = x.double(), codebook.double() * 1e-12 + 1
    found = nearest_code(x, codebook, metric=metric)
    assert vqkernels.explain("nearest_code", x, codebook).backend == "reference"
    assert (regret(x, codebook, found, metric) <= allowed_regret(x, codebook, metric)).all()
    assert len(found.unique()) > 1


def test_fast_precision_is_accepted(backend: str) -> None:
    x, codebook = make("gaussian", 50, 40, 16)
    assert_nearest(x, codebook, nearest_code(x, codebook, precision="fast"))


# ---- equal codes ---------------------------------------------------------------------------


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 3, 8, 9, 33, 128])
def test_lowest_index_of_equal_codes(backend: str, dim: int, metric: str) -> None:
    """Copies spread over lanes, panels, blocks and the threads' shares of the book."""
    distinct = make("gaussian", 0, 7, dim)[1]
    codebook = distinct[torch.randint(7, (4096,), generator=generator(3))]
    for rows in (1, 3, 14, 40, 300):
        x = make("gaussian", rows, 1, dim, seed=rows)[0]
        found = nearest_code(x, codebook, metric=metric)
        assert_nearest(x, codebook, found, metric)
    x = distinct.clone()
    assert torch.equal(
        first_of_equals(codebook)[nearest_code(x, codebook)], nearest_code(x, codebook)
    )
    assert torch.equal(codebook[nearest_code(x, codebook)], distinct)


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("dim", [2, 8, 16, 64])
def test_collapsed_book_gives_index_zero(backend: str, dim: int, rows: int, metric: str) -> None:
    x, codebook = make("collapsed", rows, 1500, dim)
    assert (nearest_code(x, codebook, metric=metric) == 0).all()


# ---- a row's answer is its own -------------------------------------------------------------


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 4, 8, 16, 64, 100])
@pytest.mark.parametrize("kind", ["gaussian", "neighbours", "lattice", "tiny", "outlier"])
def test_batch_invariance(native_cpu: None, kind: str, dim: int, metric: str) -> None:
    x, codebook = make(kind, 300, 130, dim)
    whole = nearest_code(x, codebook, metric=metric)
    packed = pack_codebook(codebook, metric=metric)
    order = torch.randperm(len(x), generator=generator(4))
    assert torch.equal(nearest_code(x, codebook, metric=metric, packed=packed), whole)
    assert torch.equal(nearest_code(x[order], codebook, metric=metric), whole[order])
    for rows in (1, 2, 3, 5, 8, 14, 15, 29, 100):
        for prepared in (None, packed):
            part = nearest_code(x[-rows:], codebook, metric=metric, packed=prepared)
            assert torch.equal(part, whole[-rows:]), f"{rows} rows"


def test_batch_invariance_of_the_reference() -> None:
    with vqkernels.use_backend("reference"):
        x, codebook = make("neighbours", 64, 130, 24)
        whole = nearest_code(x, codebook)
        alone = torch.cat([nearest_code(row[None], codebook) for row in x])
        assert torch.equal(alone, whole)


@every_capability
@pytest.mark.parametrize(
    "rows_dim_codes",
    [(3, 64, 5000), (5000, 3, 2500), (40, 33, 3000), (900, 8, 700), (800, 64, 300)],
)
@pytest.mark.parametrize("kind", ["gaussian", "neighbours", "duplicated", "lattice"])
def test_same_bits_on_any_number_of_threads(
    native_cpu: None, restored_threads: None, kind: str, rows_dim_codes: tuple[int, int, int]
) -> None:
    rows, dim, codes = rows_dim_codes
    x, codebook = make(kind, rows, codes, dim)
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        packed = pack_codebook(codebook)
        found += [nearest_code(x, codebook), nearest_code(x, codebook, packed=packed)]
    for other in found[1:]:
        assert torch.equal(other, found[0])
    assert_nearest(x, codebook, found[0])


@pytest.mark.parametrize("metric", METRICS)
def test_backends_agree_where_the_gap_is_wide(native_cpu: None, metric: str) -> None:
    x, codebook = make("gaussian", 500, 300, 24)
    ours = nearest_code(x, codebook, metric=metric)
    with vqkernels.use_backend("reference"):
        assert torch.equal(nearest_code(x, codebook, metric=metric), ours)


# ---- gradients -----------------------------------------------------------------------------


def test_indices_carry_no_gradient(backend: str) -> None:
    x, codebook = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    assert not nearest_code(x, codebook).requires_grad
    assert not nearest_code(x, codebook, packed=pack_codebook(codebook)).requires_grad
