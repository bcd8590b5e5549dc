"""`quantize` and its gradients, gathering and sums over codes on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from _helpers.data import generator
from _helpers.formulas import quantize_formulas
from _helpers.quantizing import DTYPES, assert_rounded, check_forward
from torch import Tensor

import vqkernels
from vqkernels import QuantizeOutput, code_statistics, gather_codes, nearest_code, quantize

COMMITMENT, CODEBOOK = 0.25, 1.5  # weights of the two losses
GRADIENTS = ("straight_through", "rotation", "none")


def on_cpu(output: QuantizeOutput) -> QuantizeOutput:
    return QuantizeOutput(*(tensor.detach().cpu() for tensor in output))


def check(
    device: str,
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    gradient: str = "straight_through",
) -> QuantizeOutput:
    """Run forward and backward on the device and compare all of it with float64 formulas; x,
    codebook and mask lie there already."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    arriving = torch.randn(x.shape, generator=generator(9)).to(x.dtype)
    output = quantize(x, codebook, metric=metric, mask=mask, gradient=gradient)
    assert output.quantized.device == x.device
    found = nearest_code(x.detach(), codebook.detach(), metric=metric)
    kept = torch.ones_like(found, dtype=torch.bool) if mask is None else mask
    assert torch.equal(output.indices, found.masked_fill(~kept, -1))
    expected = quantize_formulas(
        x.detach().cpu(),
        codebook.detach().cpu(),
        output.indices.cpu(),
        kept=kept.cpu(),
        grad_quantized=arriving,
        grad_commitment=COMMITMENT,
        grad_codebook_loss=CODEBOOK,
        gradient=gradient,
    )
    check_forward(on_cpu(output), x.cpu(), codebook.cpu(), expected)
    if x.numel() == 0:
        return output
    losses = COMMITMENT * output.commitment_loss + CODEBOOK * output.codebook_loss
    straight = torch.where(output.indices[..., None] >= 0, output.quantized, 0.0)
    (losses + (straight * arriving.to(device)).sum()).backward()
    assert x.grad is not None
    assert codebook.grad is not None
    assert (x.grad.dtype, codebook.grad.dtype) == (x.dtype, codebook.dtype)
    assert_rounded(x.grad.cpu(), expected.grad_x, expected.grad_x_terms)
    assert_rounded(codebook.grad.cpu(), expected.grad_codebook, expected.grad_codebook_terms)
    return output


def random(device: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(device, dtype)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dim", [3, 64, 200])
def test_forward_and_backward(gpu_backend, device, dim, dtypes, gradient):
    x_dtype, book_dtype = DTYPES[dtypes]
    x = random(device, 333, dim, dtype=x_dtype)
    codebook = random(device, 70, dim, seed=1, dtype=book_dtype)
    check(device, x, codebook, gradient=gradient)


@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_masks_and_not_a_number(gpu_backend, device, metric, gradient):
    x, codebook = random(device, 4, 61, 24), random(device, 50, 24, seed=1)
    x[0, 4, 3], x[1, 6, 2] = torch.nan, torch.inf
    codebook[7, 1] = torch.nan
    mask = torch.rand(4, 61, generator=generator(2)).to(device) > 0.3
    mask[0, 4], mask[1, 6] = False, True
    output = check(device, x, codebook, metric=metric, mask=mask, gradient=gradient)
    assert output.counts[7] == 0
    assert (output.quantized[0, 4] == 0).all()
    assert output.quantized[1, 6].isnan().all()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_books_and_strides(gpu_backend, device, gradient):
    x = random(device, 2, 6, 3, 9).permute(0, 2, 3, 1)  # [B, G, N, D]
    mask = (torch.rand(3, 2, 9, generator=generator(2)) > 0.2).transpose(0, 1).to(device)
    check(device, x, random(device, 3, 20, 6, seed=1), mask=mask, gradient=gradient)
    channel_first = random(device, 2, 5, 4, 7).permute(0, 2, 3, 1)
    check(device, channel_first, random(device, 30, 5, seed=1), gradient=gradient)
    wide = random(device, 4, 6, 4, 6, 8)[::2, ::2, ::2, ::2]
    check(device, wide, random(device, 30, 8, seed=1), gradient=gradient)


def test_nothing_to_quantize(gpu_backend, device):
    x, codebook = random(device, 6, 8), random(device, 5, 8, seed=1)
    output = check(device, x, codebook, mask=torch.zeros(6, dtype=torch.bool, device=device))
    assert output.commitment_loss == 0
    check(device, x[:0], codebook)


def test_a_collapsed_book(gpu_backend, device):
    """Every row belongs to one code: its gradient is one long sum."""
    x = random(device, 5000, 24)
    codebook = random(device, 40, 24, seed=1) * 100
    codebook[3] = 0
    output = check(device, x, codebook)
    assert output.counts[3] == 5000


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_two_runs_give_the_same_bits(gpu_backend, device, gradient):
    x = random(device, 20000, 32).requires_grad_()
    codebook = random(device, 300, 32, seed=1).requires_grad_()

    def run() -> list[Tensor]:
        output = quantize(x, codebook, gradient=gradient)
        total = output.quantized.sum() + output.commitment_loss + output.codebook_loss
        return [*output, *torch.autograd.grad(total, (x, codebook))]

    first = run()
    for _ in range(2):
        for mine, again in zip(first, run(), strict=True):
            assert torch.equal(mine, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 3, 17, 64, 300])
def test_gather(device, dtype, dim):
    codebook = random(device, 40, dim, dtype=dtype)
    indices = torch.randint(-1, 40, (7, 11), generator=generator(0)).to(device)
    expected = torch.where(indices[..., None] >= 0, codebook[indices], 0.0)
    assert torch.equal(gather_codes(codebook, indices), expected)
    assert torch.equal(gather_codes(codebook.T.contiguous().T, indices), expected)
    codebook.requires_grad_()
    weights = random(device, 7, 11, dim, seed=3, dtype=dtype)
    (grad,) = torch.autograd.grad((gather_codes(codebook, indices) * weights).sum(), codebook)
    sums = torch.zeros(41, dim, dtype=torch.float64)
    terms = sums.clone()
    labels = indices.cpu().flatten() % 41  # -1 goes to a row of its own
    sums.index_add_(0, labels, weights.cpu().double().flatten(0, 1))
    terms.index_add_(0, labels, weights.cpu().double().abs().flatten(0, 1))
    assert_rounded(grad.cpu(), sums[:40], terms[:40])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (37, 50), (3000, 7), (70000, 2)])
def test_statistics(device, rows, codes, weighted):
    x = random(device, rows, 17)
    indices = torch.randint(-1, codes, (rows,), generator=generator(0)).to(device)
    weights = random(device, rows, seed=1).abs() if weighted else None
    counts, sums = code_statistics(x, indices, codes, weights)
    scale = torch.ones(rows) if weights is None else weights.cpu()
    values = x.cpu().double() * scale.double()[:, None]
    expected = torch.zeros(codes + 1, 17, dtype=torch.float64)
    terms, total = expected.clone(), torch.zeros(codes + 1, dtype=torch.float64)
    labels = indices.cpu() % (codes + 1)
    expected.index_add_(0, labels, values)
    terms.index_add_(0, labels, values.abs())
    total.index_add_(0, labels, scale.double())
    # Chunks of rows are added up one after another, each a sum of hundreds.
    assert ((sums.cpu() - expected[:codes]).abs() <= 2.0**-17 * terms[:codes]).all()
    assert ((counts.cpu() - total[:codes]).abs() <= 2.0**-17 * total[:codes]).all()
    again = code_statistics(x, indices, codes, weights)
    assert torch.equal(again[0], counts)
    assert torch.equal(again[1], sums)


@pytest.mark.parametrize("rotation_trick", [False, True])
def test_a_layer_learns_as_on_the_cpu(device, rotation_trick):
    """VectorQuantize with a moving-average book: ten steps on the device and on the CPU."""
    from vqkernels.nn import VectorQuantize

    def train(where: str) -> list[Tensor]:
        torch.manual_seed(0)
        layer = VectorQuantize(dim=16, codebook_size=32, decay=0.8, rotation_trick=rotation_trick)
        layer = layer.to(where)
        seen = []
        for step in range(10):
            x = torch.randn(4, 50, 16, generator=generator(step)).to(where).requires_grad_()
            quantized, indices, loss = layer(x)
            (quantized.square().sum() + loss.sum()).backward()
            seen += [indices.cpu(), x.grad.cpu()]
        return [*seen, layer.codebook.detach().cpu()]

    for mine, expected in zip(train(device), train("cpu"), strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-4, atol=2e-5)


def test_autocast_leaves_dtypes_alone(gpu_backend, device):
    x, codebook = random(device, 90, 16), random(device, 50, 16, seed=1)
    plain = vqkernels.quantize(x, codebook)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = vqkernels.quantize(x, codebook)
    for mine, expected in zip(output, plain, strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)
