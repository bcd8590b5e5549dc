"""`gather_codes`: rows by index, a hole for -1, and a deterministic gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _helpers.data import generator
from torch import Tensor

from vqkernels import gather_codes

pytestmark = pytest.mark.usefixtures("one_thread")
every_capability = pytest.mark.every_capability
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def indices_for(codes: int, *shape: int, seed: int = 0) -> Tensor:
    """From -1 to codes - 1, with both ends present where there is room."""
    indices = torch.randint(-1, codes, shape, generator=generator(seed))
    flat = indices.view(-1)
    flat[:1], flat[-1:] = -1, codes - 1
    return indices


def expected_rows(codebook: Tensor, indices: Tensor) -> Tensor:
    rows = codebook[indices.clamp(min=0)]
    return torch.where((indices >= 0)[..., None], rows, torch.zeros_like(rows))


@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 5), (2, 0, 3), (4, 3, 2, 2), (3000,)])
@pytest.mark.parametrize(("codes", "dim"), [(1, 1), (5, 3), (40, 16), (33, 130)])
def test_rows(
    backend: str, codes: int, dim: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    codebook = torch.randn(codes, dim).to(dtype)
    indices = indices_for(codes, *shape)
    rows = gather_codes(codebook, indices)
    assert rows.dtype == dtype
    assert rows.shape == (*shape, dim)
    assert torch.equal(rows, expected_rows(codebook, indices))
    assert rows.is_contiguous()


def test_float64_goes_to_the_reference() -> None:
    codebook, indices = torch.randn(5, 3).double(), indices_for(5, 20)
    assert torch.equal(gather_codes(codebook, indices), expected_rows(codebook, indices))


@every_capability
def test_bits_are_copied(backend: str) -> None:
    """NaN payloads, infinities, negative zero and subnormals pass unchanged."""
    for dtype, integers in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        bits = torch.iinfo(integers)
        codebook = torch.randint(bits.min, bits.max, (64, 5), generator=generator(1)).to(integers)
        indices = torch.randint(64, (500,), generator=generator(2))
        rows = gather_codes(codebook.view(dtype), indices)
        assert torch.equal(rows.view(integers), codebook[indices])


@every_capability
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,)])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_groups(backend: str, groups: int, leading: tuple[int, ...]) -> None:
    codebook = torch.randn(groups, 9, 4)
    indices = indices_for(9, *leading, groups, 6)
    rows = gather_codes(codebook, indices)
    assert rows.shape == (*leading, groups, 6, 4)
    for group in range(groups):
        expected = expected_rows(codebook[group], indices.select(-2, group))
        assert torch.equal(rows.select(-3, group), expected)


@every_capability
def test_layouts(backend: str) -> None:
    indices = indices_for(30, 8, 12)
    codebook = torch.randn(30, 6)
    expected = expected_rows(codebook, indices)
    wide = torch.randn(61, 15)
    wide[1::2, 3:15:2] = codebook
    for book in (codebook.T.contiguous().T, wide[1::2, 3:15:2]):
        assert torch.equal(gather_codes(book, indices), expected)
    one_code = gather_codes(codebook[:1].expand(30, 6), indices)
    assert torch.equal(one_code, expected_rows(codebook[:1].expand(30, 6), indices))

    apart = torch.full((16, 24), 10**6)
    apart[1::2, ::2] = indices
    for view in (indices.T.contiguous().T, apart[1::2, ::2]):
        assert torch.equal(gather_codes(codebook, view), expected)
    one_index = torch.tensor(4).expand(10, 3)
    assert torch.equal(gather_codes(codebook, one_index), codebook[4].expand(10, 3, 6))

    grouped = torch.randn(30, 3, 6).transpose(0, 1)
    by_group = indices_for(30, 5, 7, 3).transpose(1, 2)
    rows = gather_codes(grouped, by_group)
    assert torch.equal(rows, gather_codes(grouped.contiguous(), by_group.contiguous()))


@every_capability
@pytest.mark.parametrize("wrong", [-2, 10, 1 << 40, -(1 << 62)])
@pytest.mark.parametrize("rows", [1, 5000])
def test_index_out_of_range(backend: str, rows: int, wrong: int) -> None:
    indices = torch.zeros(rows, dtype=torch.int64)
    indices[rows // 2] = wrong
    with pytest.raises(IndexError, match=r"\[-1, 9\]"):
        gather_codes(torch.randn(10, 3), indices)
    with pytest.raises(IndexError, match=r"\[-1, 9\]"):
        gather_codes(torch.randn(2, 10, 3), torch.stack([indices * 0, indices]))


# ---- gradient ------------------------------------------------------------------------------


def segment_sum(grad: Tensor, indices: Tensor, codes: int) -> Tensor:
    """The codebook's gradient in float64."""
    used = indices.flatten() >= 0
    total = torch.zeros(codes, grad.shape[-1], dtype=torch.float64)
    rows = grad.reshape(-1, grad.shape[-1])[used].double()
    return total.index_add_(0, indices.flatten()[used], rows)


@every_capability
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(("codes", "dim", "rows"), [(1, 1, 1), (7, 3, 50), (16, 130, 400)])
def test_gradient(backend: str, codes: int, dim: int, rows: int, dtype: torch.dtype) -> None:
    codebook = torch.randn(codes, dim).to(dtype).requires_grad_()
    indices = indices_for(codes, rows)
    grad = torch.randn(rows, dim).to(dtype)
    gather_codes(codebook, indices).backward(grad)
    assert codebook.grad is not None
    assert codebook.grad.dtype == dtype
    expected = segment_sum(grad, indices, codes)
    magnitudes = segment_sum(grad.abs(), indices, codes)
    rounding = torch.finfo(dtype).eps / 2 * expected.abs() + 2.0**-22 * magnitudes
    assert ((codebook.grad.double() - expected).abs() <= rounding).all()


def test_gradient_of_float64_is_exact_to_fp32() -> None:
    codebook = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    indices, grad = indices_for(5, 40), torch.randn(40, 3).double()
    gather_codes(codebook, indices).backward(grad)
    torch.testing.assert_close(codebook.grad, segment_sum(grad, indices, 5), rtol=1e-6, atol=1e-6)


@every_capability
def test_gradient_of_groups_and_of_views(backend: str) -> None:
    codebook = torch.randn(30, 3, 6).transpose(0, 1).requires_grad_()  # [G, K, D]
    indices = indices_for(30, 5, 7, 3).transpose(1, 2)  # [B, G, N]
    grad = torch.randn(5, 6, 3, 7).permute(0, 2, 3, 1)  # [B, G, N, D]
    (gradient,) = torch.autograd.grad(gather_codes(codebook, indices), codebook, grad)
    for group in range(3):
        expected = segment_sum(grad[:, group], indices[:, group], 30)
        torch.testing.assert_close(gradient[group].double(), expected, rtol=1e-6, atol=1e-6)


@every_capability
def test_gradient_of_a_sum_comes_as_a_stride_zero_view(backend: str) -> None:
    codebook = torch.randn(6, 4, requires_grad=True)
    indices = torch.tensor([0, 2, 2, -1, 5, 2])
    gather_codes(codebook, indices).sum().backward()
    assert codebook.grad is not None
    counts = torch.tensor([1.0, 0, 3, 0, 0, 1])
    assert torch.equal(codebook.grad, counts[:, None].expand(6, 4))


@every_capability
def test_gradient_is_deterministic(backend: str, restored_threads: None) -> None:
    codebook = torch.randn(3, 200, requires_grad=True)
    indices = torch.randint(-1, 3, (4000,), generator=generator(5))
    grad = torch.randn(4000, 200) * 10 ** torch.randn(4000, 1)
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found += torch.autograd.grad(gather_codes(codebook, indices), codebook, grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_missing_code_stops_the_gradient(backend: str) -> None:
    codebook = torch.randn(4, 3, requires_grad=True)
    rows = gather_codes(codebook, torch.tensor([-1, -1]))
    (gradient,) = torch.autograd.grad(rows, codebook, torch.full((2, 3), float("nan")))
    assert torch.equal(gradient, torch.zeros(4, 3))


def test_no_gradient_without_need(backend: str) -> None:
    assert not gather_codes(torch.randn(4, 3), torch.tensor([0])).requires_grad
    codebook = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        assert not gather_codes(codebook, torch.tensor([0])).requires_grad


def test_second_derivative_raises(backend: str) -> None:
    codebook = torch.randn(4, 3, requires_grad=True)
    grad = torch.randn(2, 3, requires_grad=True)
    rows = gather_codes(codebook, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(rows, codebook, grad, create_graph=True)
    with pytest.raises(NotImplementedError):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "transform",
    [lambda f, c: torch.func.grad(f)(c), lambda f, c: torch.func.jvp(f, (c,), (c,))],
    ids=["grad", "jvp"],
)
def test_transforms_are_refused(backend: str, transform: Callable[..., object]) -> None:
    """Not supported; a wrong derivative must not come out silently."""
    indices = torch.tensor([0, 3])
    with pytest.raises((RuntimeError, NotImplementedError)):
        transform(lambda codes: gather_codes(codes, indices).sum(), torch.randn(5, 4))


# ---- bad input -----------------------------------------------------------------------------

BAD_CALLS = {
    "float indices": (lambda c, i: gather_codes(c, i.float()), TypeError, "indices.*float32"),
    "int32 indices": (lambda c, i: gather_codes(c, i.int()), TypeError, "indices.*int64.*int32"),
    "list": (lambda c, i: gather_codes(c, [0]), TypeError, "indices.*list"),
    "no book": (lambda c, i: gather_codes(None, i), TypeError, "codebook.*None"),
    "integer book": (lambda c, i: gather_codes(c.int(), i), TypeError, "codebook.*int32"),
    "book of rank 1": (lambda c, i: gather_codes(c[0], i), ValueError, r"codebook.*\[K, D\]"),
    "empty book": (lambda c, i: gather_codes(c[:0], i), ValueError, "codebook"),
    "no groups": (lambda c, i: gather_codes(c[None], i), ValueError, r"indices.*\[\.\.\., G, N\]"),
    "wrong groups": (
        lambda c, i: gather_codes(c.expand(3, 6, 4), i.expand(2, 5)),
        ValueError,
        r"\[2, 5\].*\[3, 6, 4\]",
    ),
    "two devices": (lambda c, i: gather_codes(c, i.to("meta")), ValueError, "device.*meta"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(backend: str, case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(torch.randn(6, 4), torch.zeros(5, dtype=torch.int64))
