"""`quantize`: every output and gradient against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from _helpers.data import generator, make
from _helpers.exact import assert_nearest
from _helpers.quantizing import DTYPES, check

import vqkernels
from vqkernels import pack_codebook, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
every_capability = pytest.mark.every_capability
METRICS = ("l2", "dot", "cosine")


# ---- outputs and gradients -----------------------------------------------------------------


@every_capability
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("rows", "codes", "dim"),
    [(1, 1, 1), (7, 5, 3), (40, 17, 8), (300, 33, 16), (257, 64, 65), (600, 10, 130)],
)
def test_against_float64(
    backend: str, rows: int, codes: int, dim: int, metric: str, dtypes: str
) -> None:
    x, codebook = make("gaussian", rows, codes, dim)
    x, codebook = x.to(DTYPES[dtypes][0]), codebook.to(DTYPES[dtypes][1])
    output = check(x, codebook, metric=metric)
    assert_nearest(x, codebook, output.indices, metric)


@every_capability
@pytest.mark.parametrize("kind", ["clustered", "collapsed", "tiny", "offset", "huge", "minute"])
def test_hard_data(backend: str, kind: str) -> None:
    check(*make(kind, 300, 50, 20))


@every_capability
@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (1,)])
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_leading_dimensions_and_groups(
    backend: str, groups: int | None, leading: tuple[int, ...], gradient: str
) -> None:
    by_group = () if groups is None else (groups,)
    x, codebook = torch.randn(*leading, *by_group, 20, 6), torch.randn(*by_group, 9, 6)
    mask = torch.rand(x.shape[:-1]) < 0.7
    output = check(x, codebook, mask=mask, gradient=gradient, packed=pack_codebook(codebook))
    assert output.indices.shape == x.shape[:-1]
    assert output.counts.shape == codebook.shape[:-1]


@every_capability
def test_mask(backend: str) -> None:
    x, codebook = make("gaussian", 200, 20, 12)
    mask = torch.rand(200) < 0.5
    output = check(x, codebook, mask=mask)
    assert (output.indices[~mask] == -1).all()
    assert not output.quantized[~mask].any()
    alone = quantize(x[mask], codebook)
    torch.testing.assert_close(output.commitment_loss, alone.commitment_loss, rtol=1e-6, atol=0)
    assert torch.equal(output.counts, alone.counts)
    everything = quantize(x, codebook, mask=torch.ones(200, dtype=torch.bool))
    for masked, plain in zip(everything, quantize(x, codebook), strict=True):
        assert torch.equal(masked, plain)


@every_capability
def test_mask_in_any_layout(backend: str) -> None:
    x, codebook = torch.randn(6, 7, 5), torch.randn(9, 5)
    mask = torch.rand(7, 6) < 0.5
    check(x, codebook, mask=mask.T)
    check(x, codebook, mask=mask[0].expand(7, 6).T)


@every_capability
def test_everything_masked(backend: str) -> None:
    x, codebook = torch.randn(30, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    output = quantize(x, codebook, mask=torch.zeros(30, dtype=torch.bool))
    assert (output.indices == -1).all()
    assert not output.quantized.any()
    assert output.commitment_loss == output.codebook_loss == 0
    assert not output.counts.any()
    (output.commitment_loss + output.codebook_loss + output.quantized.sum()).backward()
    assert x.grad is not None
    assert codebook.grad is not None
    assert not x.grad.any()
    assert not codebook.grad.any()


@every_capability
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [4, 20])
def test_rows_without_a_code(backend: str, dim: int, dtype: torch.dtype, value: float) -> None:
    x, codebook = make("gaussian", 300, 9, dim)
    x, codebook = x.to(dtype), codebook.to(dtype)
    x[5, dim - 1] = x[200, 0] = value
    mask = torch.ones(300, dtype=torch.bool)
    output = check(x, codebook)
    assert (output.indices[[5, 200]] == -1).all()
    assert output.quantized[[5, 200]].isnan().all()
    assert output.commitment_loss.isfinite()
    assert output.counts.sum() == 298
    mask[200] = False
    output = check(x, codebook, mask=mask)
    assert output.quantized[5].isnan().all()
    assert not output.quantized[200].any()


@every_capability
def test_a_book_without_a_finite_code(backend: str) -> None:
    x, codebook = torch.randn(20, 4, requires_grad=True), torch.full((5, 4), math.nan)
    output = quantize(x, codebook)
    assert (output.indices == -1).all()
    assert output.quantized.isnan().all()
    assert output.commitment_loss == 0
    output.commitment_loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


@every_capability
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 3, 4)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    x, codebook = torch.randn(shape, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    output = quantize(x, codebook)
    assert output.quantized.shape == shape
    assert output.indices.shape == shape[:-1]
    assert output.commitment_loss == output.codebook_loss == 0
    assert torch.equal(output.counts, torch.zeros(5))
    (output.commitment_loss + output.codebook_loss + output.quantized.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert codebook.grad is not None
    assert not codebook.grad.any()


@every_capability
def test_empty_groups(backend: str) -> None:
    output = quantize(torch.randn(2, 3, 0, 4), torch.randn(3, 5, 4))
    assert output.indices.shape == (2, 3, 0)
    assert torch.equal(output.counts, torch.zeros(3, 5))
    output = quantize(torch.randn(0, 3, 7, 4), torch.randn(3, 5, 4))
    assert output.indices.shape == (0, 3, 7)


def test_float64_goes_to_the_reference() -> None:
    x, codebook = make("gaussian", 40, 9, 5)
    check(x.double(), codebook.double())


# ---- layouts -------------------------------------------------------------------------------


@every_capability
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [4, 20])
def test_channel_first_keeps_its_memory_layout(backend: str, dim: int, dtype: torch.dtype) -> None:
    feature_map = torch.randn(3, dim, 9, 8).to(dtype)
    codebook = torch.randn(30, dim).to(dtype)
    view = feature_map.permute(0, 2, 3, 1)
    output = check(view, codebook)
    assert output.quantized.stride() == view.stride()
    assert output.quantized.permute(0, 3, 1, 2).is_contiguous()
    x = view.detach().requires_grad_()
    quantize(x, codebook).commitment_loss.backward()
    assert x.grad is not None
    assert x.grad.permute(0, 3, 1, 2).is_contiguous()


@every_capability
def test_strided_rows_and_codes(backend: str) -> None:
    x, codebook = torch.randn(60, 20)[::2, 1::2], torch.randn(10, 16).T
    assert not x.is_contiguous()
    check(x, codebook)
    check(torch.randn(1, 10).expand(40, 10), codebook)
    check(torch.randn(40, 1).expand(40, 10), codebook)
    heads = torch.randn(2, 9, 3 * 8).unflatten(-1, (3, 8)).transpose(1, 2)
    check(heads, torch.randn(40, 3, 8).transpose(0, 1))
    check(heads, torch.randn(1, 40, 8).expand(3, 40, 8))


@every_capability
def test_gradient_of_any_layout(backend: str) -> None:
    """What arrives as the gradient of `quantized` may be a view: transposed, or of stride zero."""
    x, codebook = torch.randn(6, 10, requires_grad=True), torch.randn(4, 10)
    for grad in (
        torch.randn(10, 6).T,
        torch.randn(1, 10).expand(6, 10),
        torch.randn(6, 1).expand(6, 10),
        torch.randn(12, 20)[::2, ::2],
    ):
        (gradient,) = torch.autograd.grad(quantize(x, codebook).quantized, x, grad)
        assert torch.equal(gradient, grad)


# ---- extremes ---------------------------------------------------------------


@every_capability
def test_losses_of_extreme_scales(backend: str) -> None:
    x, codebook = make("gaussian", 50, 9, 8)
    for scale, expected in ((1e18, True), (1e30, False)):
        output = quantize(x * scale, codebook * scale)
        assert bool(output.commitment_loss.isfinite()) is expected
        assert not output.commitment_loss.isnan()
    largest = torch.tensor([[65504.0, -65504.0]], dtype=torch.float16)
    output = quantize(largest, -largest)
    assert output.indices.tolist() == [0]
    assert output.commitment_loss == torch.tensor(131008.0**2)


@every_capability
def test_a_code_beyond_fp16_becomes_infinite(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float16)
    output = quantize(x, torch.tensor([[1e6, -1e6]]))
    assert torch.equal(output.quantized, torch.tensor([[math.inf, -math.inf]]).half())


@every_capability
def test_rounding_of_codes_to_half_precision(backend: str) -> None:
    """Round to nearest even, over subnormals and ties, as `Tensor.to` does."""
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.randint(-(2**31), 2**31 - 1, (4000,), generator=generator(6)).int()
        floats = bits.view(torch.float32)
        halves = torch.arange(2**15 - 1).short().view(dtype).float()
        ties = (halves[:-1] + halves[1:]) / 2  # exact in fp32
        codes = torch.cat(
            [floats, halves, ties, -ties, ties * (1 + 2.0**-23), ties * (1 - 2.0**-23)]
        )
        codes = codes[codes.isfinite()]
        for code in codes.split(500):
            book = torch.full((2, len(code)), math.nan)
            book[1] = code
            output = quantize(torch.zeros(1, len(code), dtype=dtype), book)
            assert torch.equal(output.quantized[0], code.to(dtype))


# ---- determinism ---------------------------------------------------------------------------


@every_capability
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dim", [3, 70])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_same_bits_on_any_number_of_threads(
    backend: str, restored_threads: None, gradient: str, dim: int, groups: int | None
) -> None:
    by_group = () if groups is None else (groups,)
    x, codebook = torch.randn(3, *by_group, 900, dim), torch.randn(*by_group, 12, dim)
    mask = torch.rand(x.shape[:-1]) < 0.9
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        rows, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
        output = quantize(rows, codes, mask=mask, gradient=gradient)
        total = output.commitment_loss + output.codebook_loss + output.quantized.square().sum()
        found.append([*output, *torch.autograd.grad(total, (rows, codes))])
    for other in found[1:]:
        for mine, first in zip(other, found[0], strict=True):
            assert torch.equal(mine, first)


def test_backends_agree(native_cpu: None) -> None:
    x, codebook = make("gaussian", 400, 60, 24)
    ours = quantize(x, codebook)
    with vqkernels.use_backend("reference"):
        plain = quantize(x, codebook)
    assert torch.equal(ours.indices, plain.indices)
    assert torch.equal(ours.quantized, plain.quantized)
    assert torch.equal(ours.counts, plain.counts)
    torch.testing.assert_close(ours.commitment_loss, plain.commitment_loss, rtol=1e-6, atol=0)


# ---- bad input -----------------------------------------------------------------------------

BAD_CALLS = {
    "x of rank 1": (lambda x, c: quantize(x[0], c), ValueError, r"x must be \[\.\.\., N, D\]"),
    "another D": (lambda x, c: quantize(x, c[:, :3]), ValueError, r"\[5, 4\].*\[6, 3\]"),
    "no codes": (lambda x, c: quantize(x, c[:0]), ValueError, "at least one code"),
    "integer x": (lambda x, c: quantize(x.int(), c), TypeError, "x must be float32.*int32"),
    "mixed halves": (
        lambda x, c: quantize(x.half(), c.bfloat16()),
        TypeError,
        "float16.*bfloat16",
    ),
    "two devices": (lambda x, c: quantize(x, c.to("meta")), ValueError, "device.*meta"),
    "unknown metric": (lambda x, c: quantize(x, c, metric="l1"), ValueError, "metric.*'l1'"),
    "unknown gradient": (
        lambda x, c: quantize(x, c, gradient="ste"),
        ValueError,
        "gradient must be one of 'straight_through', .*got 'ste'",
    ),
    "mask of another shape": (
        lambda x, c: quantize(x, c, mask=torch.ones(4, dtype=torch.bool)),
        ValueError,
        r"mask must have shape \[5\], got \[4\]",
    ),
    "float mask": (lambda x, c: quantize(x, c, mask=x[:, 0]), TypeError, "mask.*bool.*float32"),
    "list mask": (lambda x, c: quantize(x, c, mask=[True] * 5), TypeError, "mask.*list"),
    "mask elsewhere": (
        lambda x, c: quantize(x, c, mask=torch.ones(5, dtype=torch.bool, device="meta")),
        ValueError,
        "mask.*device.*meta",
    ),
    "packed of another shape": (
        lambda x, c: quantize(x, c, packed=torch.zeros(1, 3)),
        ValueError,
        "packed.*float32",
    ),
    "packed elsewhere": (
        lambda x, c: quantize(x, c, packed=pack_codebook(c).to("meta")),
        ValueError,
        "packed.*device.*meta",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(backend: str, case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(torch.randn(5, 4), torch.randn(6, 4))


def test_packed_of_another_metric_is_refused(native_cpu: None) -> None:
    x, codebook = make("gaussian", 5, 20, 6)
    with pytest.raises(ValueError, match="packed"):
        quantize(x, codebook, metric="cosine", packed=pack_codebook(codebook))
