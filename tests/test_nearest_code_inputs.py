"""`nearest_code` on every kind of input: layouts, extremes, packed books, mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from _helpers.data import generator, make
from _helpers.exact import assert_nearest
from torch import Tensor

import vqkernels
from vqkernels import nearest_code, pack_codebook

METRICS = ("l2", "dot", "cosine")

pytestmark = pytest.mark.usefixtures("one_thread")
every_capability = pytest.mark.every_capability


# ---- layouts -------------------------------------------------------------------------------


def layouts_of(x: Tensor) -> dict[str, Tensor]:
    """The same numbers `[N, D]` in every layout; only values may matter."""
    rows, dim = x.shape
    every_third = torch.full((3 * rows, dim), math.nan, dtype=x.dtype)
    every_third[1::3] = x
    every_second_column = torch.full((rows, 2 * dim), math.nan, dtype=x.dtype)
    every_second_column[:, ::2] = x
    offset = torch.full((rows + 5, dim + 3), math.nan, dtype=x.dtype)
    offset[5:, 3:] = x
    return {
        "rows apart": every_third[1::3],
        "columns apart": every_second_column[:, ::2],
        "offset": offset[5:, 3:],
        "transposed": x.T.contiguous().T,
        "a slice of the middle": torch.stack([x + 1, x, x - 1], 1)[:, 1],
        "last of three": torch.stack([x + 1, x - 1, x], -1)[..., 2],
    }


@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [6, 250])
@pytest.mark.parametrize("dim", [1, 4, 8, 9, 40])
def test_layouts(backend: str, dim: int, rows: int, dtype: torch.dtype) -> None:
    x, codebook = make("gaussian", rows, 70, dim)
    x, codebook = x.to(dtype), codebook.to(dtype)
    expected = nearest_code(x, codebook)
    for name, view in layouts_of(x).items():
        assert torch.equal(view, x)
        assert torch.equal(nearest_code(view, codebook), expected), f"x: {name}"
    for name, view in layouts_of(codebook).items():
        assert torch.equal(nearest_code(x, view), expected), f"codebook: {name}"
        packed = pack_codebook(view)
        assert torch.equal(nearest_code(x, view, packed=packed), expected), f"packed: {name}"


@every_capability
def test_channel_first(backend: str) -> None:
    for dim in (4, 16, 64):
        feature_map = torch.randn(3, dim, 7, 5)
        codebook = torch.randn(50, dim)
        view = feature_map.permute(0, 2, 3, 1)
        found = nearest_code(view, codebook)
        assert found.shape == (3, 7, 5)
        expected = nearest_code(view.reshape(-1, dim).contiguous(), codebook)
        assert torch.equal(found.flatten(), expected)
        assert found.is_contiguous()


@every_capability
def test_expanded_and_overlapping_rows(backend: str) -> None:
    codebook = torch.randn(50, 6)
    row = torch.randn(6)
    one = nearest_code(row[None], codebook)
    assert torch.equal(nearest_code(row.expand(40, 6), codebook), one.expand(40))
    assert torch.equal(nearest_code(row.expand(2, 3, 40, 6), codebook), one.expand(2, 3, 40))
    windows = torch.randn(60).as_strided((55, 6), (1, 1))
    assert torch.equal(nearest_code(windows, codebook), nearest_code(windows.clone(), codebook))
    spread = torch.randn(40, 1).expand(40, 6)
    assert torch.equal(nearest_code(spread, codebook), nearest_code(spread.clone(), codebook))
    assert (nearest_code(torch.randn(40, 6), row.expand(50, 6)) == 0).all()


@every_capability
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3), (1, 1), (0,), (2, 0)])
def test_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    x, codebook = torch.randn(*leading, 11, 5), torch.randn(20, 5)
    found = nearest_code(x, codebook)
    assert found.shape == (*leading, 11)
    assert torch.equal(found.flatten(), nearest_code(x.reshape(-1, 5), codebook))


def test_many_separately_strided_dimensions(backend: str) -> None:
    x = torch.randn([2] * 10).permute(9, 0, 8, 1, 7, 2, 6, 3, 5, 4)
    codebook = torch.randn(7, 2)
    found = nearest_code(x, codebook)
    assert torch.equal(found, nearest_code(x.contiguous(), codebook))


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("dim", [4, 40])
def test_books_of_groups(
    backend: str, dim: int, groups: int, leading: tuple[int, ...], metric: str
) -> None:
    x, codebook = torch.randn(*leading, groups, 13, dim), torch.randn(groups, 33, dim)
    packed = pack_codebook(codebook, metric=metric)
    found = nearest_code(x, codebook, metric=metric)
    assert found.shape == (*leading, groups, 13)
    assert torch.equal(nearest_code(x, codebook, metric=metric, packed=packed), found)
    for group in range(groups):
        alone = nearest_code(x.select(-3, group), codebook[group], metric=metric)
        assert torch.equal(found.select(-2, group), alone), f"group {group}"


@every_capability
def test_strided_groups(backend: str) -> None:
    """Heads that lie beside each other in one row: `[B, N, G * D]` seen as `[B, G, N, D]`."""
    x = torch.randn(2, 9, 3 * 8).unflatten(-1, (3, 8)).transpose(1, 2)
    codebook = torch.randn(40, 3, 8).transpose(0, 1)
    found = nearest_code(x, codebook)
    assert torch.equal(found, nearest_code(x.contiguous(), codebook.contiguous()))
    shared = nearest_code(x, codebook[:1].expand(3, 40, 8))
    assert torch.equal(shared, nearest_code(x, codebook[0]))


# ---- not a number, infinities, extremes ----------------------------------------------------


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dim", [1, 4, 8, 9, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_are_not_finite(
    backend: str, dtype: torch.dtype, dim: int, value: float, metric: str
) -> None:
    for rows in (1, 15, 240):
        x, codebook = make("gaussian", rows, 40, dim)
        x, codebook = x.to(dtype), codebook.to(dtype)
        expected = nearest_code(x, codebook, metric=metric).clone()
        bad = torch.arange(0, rows, 3)
        for column in {0, dim // 2, dim - 1}:
            broken = x.clone()
            broken[bad, column] = value
            expected[bad] = -1
            assert torch.equal(nearest_code(broken, codebook, metric=metric), expected)


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dim", [1, 4, 8, 9, 64])
def test_codes_that_are_not_finite_are_never_chosen(
    backend: str, dim: int, value: float, metric: str
) -> None:
    for rows in (2, 240):
        x, codebook = make("gaussian", rows, 100, dim)
        bad = torch.arange(100) % 3 != 1
        bad[32:64] = True
        codebook[bad, dim // 2] = value
        found = nearest_code(x, codebook, metric=metric)
        packed = pack_codebook(codebook, metric=metric)
        assert torch.equal(nearest_code(x, codebook, metric=metric, packed=packed), found)
        good = (~bad).nonzero()[:, 0]
        assert torch.equal(found, good[nearest_code(x, codebook[good], metric=metric)])


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dim", [3, 8, 40])
def test_a_book_without_a_finite_code(backend: str, dim: int, value: float, metric: str) -> None:
    for rows in (0, 2, 300):
        x = torch.randn(rows, dim)
        codebook = torch.full((37, dim), value)
        assert torch.equal(nearest_code(x, codebook, metric=metric), torch.full((rows,), -1))


@every_capability
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_zero_rows_are_as_near_to_every_code(backend: str, metric: str) -> None:
    x, codebook = torch.zeros(20, 12), torch.randn(30, 12)
    codebook[0, 3] = math.nan
    assert (nearest_code(x, codebook, metric=metric) == 1).all()


@every_capability
@pytest.mark.parametrize("rows", [9, 260])
@pytest.mark.parametrize("dim", [1, 5, 8, 12, 48])
def test_zero_code_under_cosine_has_similarity_zero(backend: str, dim: int, rows: int) -> None:
    x, codebook = torch.rand(rows, dim) + 0.1, -torch.rand(50, dim) - 0.1
    codebook[20] = 0
    codebook[30] = 0
    assert (nearest_code(x, codebook, metric="cosine") == 20).all()
    assert_nearest(-x, codebook, nearest_code(-x, codebook, metric="cosine"), "cosine")


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("x_scale", [1e-40, 1e-30, 1e-18, 1.0, 1e18, 1e30, 1e38])
@pytest.mark.parametrize("book_scale", [1e-40, 1e-30, 1e-18, 1.0, 1e18, 1e30, 1e38])
def test_extreme_scales(backend: str, x_scale: float, book_scale: float, metric: str) -> None:
    for dim in (4, 40):
        for rows in (7, 230):
            x, codebook = torch.rand(rows, dim) * 2 - 1, torch.rand(45, dim) * 2 - 1
            x, codebook = x * x_scale, codebook * book_scale
            found = nearest_code(x, codebook, metric=metric)
            assert_nearest(x, codebook, found, metric)


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [4, 40])
def test_one_extreme_among_ordinary_numbers(backend: str, dim: int, metric: str) -> None:
    for rows in (7, 230):
        for factor in (0.0, 1e-42, 1e-30, 1e20, 1e38):
            x, codebook = torch.rand(rows, dim) - 0.5, torch.rand(90, dim) - 0.5
            expected = nearest_code(x, codebook, metric=metric)
            x[3] *= factor
            found = nearest_code(x, codebook, metric=metric)
            assert_nearest(x, codebook, found, metric)
            others = torch.arange(rows) != 3
            assert torch.equal(found[others], expected[others]), f"row times {factor}"
            codebook[40] *= factor
            found = nearest_code(x, codebook, metric=metric)
            assert_nearest(x, codebook, found, metric)


@every_capability
@pytest.mark.parametrize("metric", METRICS)
def test_largest_numbers_of_a_type(backend: str, metric: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        largest = torch.finfo(dtype).max
        for dim in (2, 8, 40):
            signs = torch.randint(0, 2, (30, dim), generator=generator(dim)) * 2.0 - 1
            codebook = (signs * largest).to(dtype)
            assert codebook.isfinite().all()
            found = nearest_code(codebook, codebook, metric=metric)
            assert torch.equal(codebook[found], codebook)


@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_smallest_numbers_of_a_type(backend: str, dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for dim in (2, 9, 40):
        units = torch.randint(-20, 21, (60, dim), generator=generator(dim))
        codebook = (units * step).to(dtype)
        found = nearest_code(codebook, codebook)
        assert torch.equal(codebook[found], codebook)


# ---- packed books --------------------------------------------------------------------------


def test_packed_of_another_metric_is_refused(native_cpu: None) -> None:
    x, codebook = make("gaussian", 5, 20, 6)
    for made, used in (("l2", "cosine"), ("cosine", "dot"), ("dot", "l2")):
        with pytest.raises(ValueError, match="packed"):
            nearest_code(x, codebook, metric=used, packed=pack_codebook(codebook, metric=made))


def test_packed_of_another_shape_is_refused(backend: str) -> None:
    x, codebook = make("gaussian", 5, 20, 6)
    for other in (torch.randn(200, 6), torch.randn(20, 30), torch.randn(2, 20, 6)):
        with pytest.raises(ValueError, match="packed"):
            nearest_code(x, codebook, packed=pack_codebook(other))


def test_packed_of_another_size_in_the_same_panels_is_refused(native_cpu: None) -> None:
    x, codebook = make("gaussian", 5, 20, 6)
    with pytest.raises(ValueError, match="packed"):
        nearest_code(x, codebook, packed=pack_codebook(codebook[:19]))


def test_what_is_no_packed_book_is_refused(native_cpu: None) -> None:
    x, codebook = make("gaussian", 5, 20, 6)
    packed = pack_codebook(codebook)
    for wrong in (torch.zeros_like(packed), packed + 1, packed[:, :-1], packed.double()):
        with pytest.raises(ValueError, match="packed"):
            nearest_code(x, codebook, packed=wrong)
    with pytest.raises(TypeError, match="packed"):
        nearest_code(x, codebook, packed=[1.0])
    with pytest.raises(ValueError, match="packed"):
        nearest_code(x, codebook, packed=packed.to("meta"))
    with vqkernels.use_backend("reference"):
        blank = pack_codebook(codebook)
    with pytest.raises(ValueError, match="packed"):
        nearest_code(x, codebook, packed=blank)


def test_packed_in_another_layout_is_refused(native_cpu: None) -> None:
    """A kernel reads a packed book as one piece; a view of the right shape may end before it."""
    x, codebook = torch.randn(2, 30, 6), torch.randn(1, 20, 6).expand(2, 20, 6)
    packed = pack_codebook(codebook)
    apart = torch.stack([packed, packed], -1)[..., 0]
    shared = pack_codebook(codebook[:1]).expand(2, -1)
    for view in (apart, shared):
        with pytest.raises(ValueError, match="packed"):
            nearest_code(x, codebook, packed=view)


def test_packing_does_not_change_the_book(native_cpu: None) -> None:
    codebook = make("duplicated", 0, 50, 40)[1]
    before, version = codebook.clone(), codebook._version
    first, second = pack_codebook(codebook), pack_codebook(codebook)
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))
    assert torch.equal(codebook, before)
    assert codebook._version == version


# ---- bad input -----------------------------------------------------------------------------

BAD_CALLS = {
    "x of rank 1": (lambda x, c: nearest_code(x[0], c), ValueError, r"x must be \[\.\.\., N, D\]"),
    "codebook of rank 1": (lambda x, c: nearest_code(x, c[0]), ValueError, r"codebook.*\[K, D\]"),
    "codebook of rank 4": (lambda x, c: nearest_code(x, c[None, None]), ValueError, "codebook"),
    "no group in x": (lambda x, c: nearest_code(x, c[None]), ValueError, r"G, N, D"),
    "wrong groups": (
        lambda x, c: nearest_code(x.expand(3, 5, 4), c.expand(2, 6, 4)),
        ValueError,
        r"\[3, 5, 4\].*\[2, 6, 4\]",
    ),
    "another D": (lambda x, c: nearest_code(x, c[:, :3]), ValueError, r"\[5, 4\].*\[6, 3\]"),
    "no codes": (lambda x, c: nearest_code(x, c[:0]), ValueError, r"at least one code.*\[0, 4\]"),
    "D = 0": (lambda x, c: nearest_code(x[:, :0], c[:, :0]), ValueError, "codebook"),
    "no groups": (
        lambda x, c: nearest_code(x.new_empty(0, 5, 4), c.new_empty(0, 6, 4)),
        ValueError,
        "codebook",
    ),
    "integer x": (lambda x, c: nearest_code(x.int(), c), TypeError, "x must be float32.*int32"),
    "integer codebook": (lambda x, c: nearest_code(x, c.long()), TypeError, "codebook.*int64"),
    "bool x": (lambda x, c: nearest_code(x > 0, c), TypeError, "x must be float32.*bool"),
    "complex x": (lambda x, c: nearest_code(x + 0j, c), TypeError, "x must be float32.*complex"),
    "mixed halves": (
        lambda x, c: nearest_code(x.half(), c.bfloat16()),
        TypeError,
        "x and codebook.*float16.*bfloat16",
    ),
    "half codebook": (lambda x, c: nearest_code(x, c.half()), TypeError, "x and codebook.*float16"),
    "double x": (lambda x, c: nearest_code(x.double(), c), TypeError, "x and codebook.*float64"),
    "two devices": (lambda x, c: nearest_code(x, c.to("meta")), ValueError, "device.*cpu.*meta"),
    "two devices, x": (lambda x, c: nearest_code(x.to("meta"), c), ValueError, "device.*meta"),
    "unknown metric": (
        lambda x, c: nearest_code(x, c, metric="L2"),
        ValueError,
        "metric must be one of 'l2', 'dot', 'cosine', got 'L2'",
    ),
    "unknown precision": (
        lambda x, c: nearest_code(x, c, precision="half"),
        ValueError,
        "precision must be one of 'exact', 'fast', got 'half'",
    ),
    "list": (lambda x, c: nearest_code(x.tolist(), c), TypeError, "x must be a torch.Tensor.*list"),
    "no codebook": (lambda x, c: nearest_code(x, None), TypeError, "codebook.*Tensor.*None"),
    "packing a list": (lambda x, c: pack_codebook([1.0]), TypeError, "codebook.*list"),
    "packing rank 1": (lambda x, c: pack_codebook(c[0]), ValueError, "codebook"),
    "packing integers": (lambda x, c: pack_codebook(c.int()), TypeError, "codebook.*int32"),
    "packing no codes": (lambda x, c: pack_codebook(c[:0]), ValueError, "codebook"),
    "packing for a metric": (lambda x, c: pack_codebook(c, metric="x"), ValueError, "metric.*'x'"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(backend: str, case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(torch.randn(5, 4), torch.randn(6, 4))


def test_a_broken_code_is_not_taken_for_a_zero_code(backend: str) -> None:
    codebook = torch.tensor([[torch.nan, 0.0, 0.0], [0.0, 0.0, 0.0], [torch.inf, 0.0, 0.0]])
    for metric in ("l2", "dot", "cosine"):
        assert vqkernels.nearest_code(torch.zeros(1, 3), codebook, metric=metric).item() == 1
