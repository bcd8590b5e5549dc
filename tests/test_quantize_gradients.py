"""The gradients of `quantize`: what reaches x, what reaches the book, and what nothing reaches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from _helpers.data import make
from _helpers.formulas import rotation
from _helpers.quantizing import DTYPES, check
from torch import Tensor

from vqkernels import quantize

pytestmark = pytest.mark.usefixtures("one_thread")
every_capability = pytest.mark.every_capability
METRICS = ("l2", "dot", "cosine")


@every_capability
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_eager(backend: str, dtype: torch.dtype) -> None:
    """max |out - ref64| <= 2 max |eager - ref64| + 1 ulp of the largest magnitude."""
    x, codebook = make("gaussian", 400, 40, 24)
    x, codebook = x.to(dtype).requires_grad_(), codebook.to(dtype).requires_grad_()
    output = quantize(x, codebook)
    loss = 0.25 * output.commitment_loss + output.codebook_loss
    ours = (output.commitment_loss, *torch.autograd.grad(loss, (x, codebook)))

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows, codes = (t.detach().to(dtype).requires_grad_() for t in (x, codebook))
        chosen = codes[output.indices]
        commitment = torch.nn.functional.mse_loss(rows, chosen.detach())
        both = 0.25 * commitment + torch.nn.functional.mse_loss(chosen, rows.detach())
        return commitment, *torch.autograd.grad(both, (rows, codes))

    for mine, eager, exact in zip(ours, plain(dtype), plain(torch.float64), strict=True):
        ulp = torch.finfo(dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= 2 * (eager - exact).abs().max() + ulp


# ---- which gradient goes where -------------------------------------------------------------


@every_capability
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("groups", [None, 3])
def test_gradients_equal_autograd(backend: str, groups: int | None, metric: str) -> None:
    """Against plain PyTorch with the indices held fixed, in float64."""
    by_group = () if groups is None else (groups,)
    x = torch.randn(2, *by_group, 30, 7, requires_grad=True)
    codebook = torch.randn(*by_group, 11, 7, requires_grad=True)
    direction = torch.randn(x.shape)

    output = quantize(x, codebook, metric=metric)
    loss = (output.quantized.sin() * direction).sum()
    loss = loss + 0.25 * output.commitment_loss + output.codebook_loss * 0.5
    ours = torch.autograd.grad(loss, (x, codebook))

    x64, codebook64 = (t.detach().double().requires_grad_() for t in (x, codebook))
    if groups is None:
        code = codebook64[output.indices]
    else:
        code = codebook64[torch.arange(groups)[:, None], output.indices]
    straight = x64 + (code - x64).detach()
    loss64 = (straight.sin() * direction).sum()
    loss64 = loss64 + 0.25 * torch.nn.functional.mse_loss(x64, code.detach())
    loss64 = loss64 + 0.5 * torch.nn.functional.mse_loss(code, x64.detach())
    theirs = torch.autograd.grad(loss64, (x64, codebook64))
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), plain, rtol=1e-5, atol=1e-6)


@every_capability
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(
    ("rows", "codes", "dim"), [(1, 1, 1), (70, 9, 3), (40, 5, 17), (70, 9, 64)]
)
def test_rotation(backend: str, rows: int, codes: int, dim: int, dtypes: str) -> None:
    x, codebook = make("gaussian", rows, codes, dim)
    x, codebook = x.to(DTYPES[dtypes][0]), codebook.to(DTYPES[dtypes][1])
    check(x, codebook, gradient="rotation")


@every_capability
def test_rotation_turns_the_row_onto_its_code(backend: str) -> None:
    """lambda R x is the code, so the gradient against x is that of |code|^2 along it."""
    x, codebook = make("gaussian", 50, 9, 12)
    x.requires_grad_()
    output = quantize(x, codebook, gradient="rotation")
    code = codebook[output.indices]
    (gradient,) = torch.autograd.grad(output.quantized, x, code)
    along = (gradient * x).sum(-1)
    torch.testing.assert_close(along, code.square().sum(-1), rtol=1e-5, atol=1e-5)
    lengths = code.norm(dim=-1) / x.norm(dim=-1) * code.norm(dim=-1)
    torch.testing.assert_close(gradient.norm(dim=-1), lengths, rtol=1e-5, atol=1e-5)


@every_capability
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_rotation_of_nearly_opposite_rows_is_no_worse_than_eager(
    backend: str, distance: float
) -> None:
    """Where u + v is short, w must come from u + v itself, not from 2 + 2 u.v, which cancels."""
    code = torch.randn(1, 16)
    x = (-code + distance * torch.randn(200, 16)).requires_grad_()
    grad = torch.randn(200, 16)
    (ours,) = torch.autograd.grad(quantize(x, code, gradient="rotation").quantized, x, grad)

    def plain(dtype: torch.dtype) -> Tensor:
        turn, _ = rotation(x.detach().to(dtype), code.to(dtype).expand(200, 16))
        return (turn.mT @ grad.to(dtype)[..., None])[..., 0]

    exact, eager = plain(torch.float64), plain(torch.float32)
    ulp = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (eager - exact).abs().max() + ulp


@every_capability
def test_rotation_where_directions_are_missing_or_opposite(backend: str) -> None:
    """A zero row, a zero code, and a code straight behind the row: nothing but numbers."""
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]], requires_grad=True)
    for book in ([[1.0, 0.0]], [[0.0, 0.0]], [[-2.0, 0.0]]):
        output = quantize(x, torch.tensor(book), gradient="rotation")
        (gradient,) = torch.autograd.grad(output.quantized, x, torch.ones(3, 2))
        assert gradient.isfinite().all(), book
    x = torch.full((2, 3), math.nan, requires_grad=True)
    output = quantize(x, torch.randn(4, 3), gradient="rotation")
    (gradient,) = torch.autograd.grad(output.quantized, x, torch.ones(2, 3))
    assert not gradient.any()


@every_capability
@pytest.mark.parametrize("dim", [4, 20])
def test_rotation_in_any_layout(backend: str, dim: int) -> None:
    x = torch.randn(3, dim, 9, 8).permute(0, 2, 3, 1).requires_grad_()
    codebook = torch.randn(dim, 30).T
    grad = torch.randn(9, 8, 3, dim).permute(2, 0, 1, 3)
    output = quantize(x, codebook, gradient="rotation")
    (gradient,) = torch.autograd.grad(output.quantized, x, grad)
    dense = x.detach().contiguous().requires_grad_()
    output = quantize(dense, codebook.contiguous(), gradient="rotation")
    (expected,) = torch.autograd.grad(output.quantized, dense, grad.contiguous())
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@every_capability
def test_each_loss_has_one_receiver(backend: str) -> None:
    x, codebook = torch.randn(20, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    to_x, to_book = torch.autograd.grad(
        quantize(x, codebook).commitment_loss, (x, codebook), allow_unused=True
    )
    assert to_x.any()
    assert to_book is None or not to_book.any()
    to_x, to_book = torch.autograd.grad(
        quantize(x, codebook).codebook_loss, (x, codebook), allow_unused=True
    )
    assert to_x is None or not to_x.any()
    assert to_book.any()
    to_x, to_book = torch.autograd.grad(
        quantize(x, codebook).quantized.sum(), (x, codebook), allow_unused=True
    )
    assert torch.equal(to_x, torch.ones(20, 4))
    assert to_book is None or not to_book.any()


@every_capability
def test_gradient_none_stops_what_comes_through_quantized(backend: str) -> None:
    x, codebook = torch.randn(20, 4, requires_grad=True), torch.randn(5, 4)
    output = quantize(x, codebook, gradient="none")
    (only_commitment,) = torch.autograd.grad(output.commitment_loss, x, retain_graph=True)
    total = output.quantized.square().sum() + output.commitment_loss
    (both,) = torch.autograd.grad(total, x)
    assert torch.equal(both, only_commitment)
    assert both.any()


@every_capability
def test_a_frozen_side_gets_no_gradient(backend: str) -> None:
    x, codebook = torch.randn(20, 4), torch.randn(5, 4)
    assert not any(value.requires_grad for value in quantize(x, codebook))
    output = quantize(x.requires_grad_(), codebook)
    (output.quantized.sum() + output.commitment_loss + output.codebook_loss).backward()
    assert codebook.grad is None
    assert x.grad is not None
    output = quantize(x.detach(), codebook.requires_grad_())
    output.codebook_loss.backward()
    assert codebook.grad is not None
    assert codebook.grad.any()


@every_capability
def test_indices_and_counts_are_not_differentiable(backend: str) -> None:
    x, codebook = torch.randn(20, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    output = quantize(x, codebook)
    assert not output.indices.requires_grad
    assert not output.counts.requires_grad
    assert output.quantized.requires_grad
    assert output.commitment_loss.requires_grad
    assert output.codebook_loss.requires_grad


def test_second_derivative_raises(backend: str) -> None:
    for pick in ("commitment_loss", "codebook_loss"):
        x, codebook = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        loss = getattr(quantize(x, codebook), pick)
        wanted = x if pick == "commitment_loss" else codebook
        (gradient,) = torch.autograd.grad(loss, wanted, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative"):
            gradient.square().sum().backward()
    x = torch.randn(9, 4, requires_grad=True)
    quantized = quantize(x, torch.randn(5, 4)).quantized
    (gradient,) = torch.autograd.grad(quantized.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
    ],
    ids=["grad", "jacrev", "jvp"],
)
def test_transforms_are_refused(backend: str, transform: Callable[..., object]) -> None:
    """Not supported; a wrong derivative must not come out silently."""
    codebook = torch.randn(5, 4)
    with pytest.raises((RuntimeError, NotImplementedError)):
        transform(lambda x: quantize(x, codebook).commitment_loss, torch.randn(9, 4))


def test_changing_x_or_the_book_before_the_backward_is_noticed(backend: str) -> None:
    for changed in ("x", "codebook"):
        x, codebook = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        output = quantize(x, codebook)
        with torch.no_grad():
            (x if changed == "x" else codebook).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (output.commitment_loss + output.codebook_loss).backward()
