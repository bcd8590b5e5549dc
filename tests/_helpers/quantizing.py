"""`quantize` run forward and backward and compared, all of it, with float64."""

from __future__ import annotations

import torch
from torch import Tensor

from _helpers.data import generator
from _helpers.formulas import Quantized, quantize_formulas
from vqkernels import QuantizeOutput, nearest_code, quantize

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16 and float32": (torch.float16, torch.float32),
    "bfloat16 and float32": (torch.bfloat16, torch.float32),
}
_COMMITMENT, _CODEBOOK = 0.25, 1.5  # weights of the two losses


def assert_rounded(actual: Tensor, expected: Tensor, terms: Tensor) -> None:
    """`actual` is a sum in fp32 of terms of this total magnitude, rounded once to its dtype."""
    limits = torch.finfo(actual.dtype)
    rounding = limits.eps / 2 * expected.abs() + limits.smallest_normal * limits.eps
    assert ((actual.double() - expected).abs() <= rounding + 2.0**-22 * terms).all()


def check(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    gradient: str = "straight_through",
    packed: Tensor | None = None,
) -> QuantizeOutput:
    """Run forward and backward and compare all of it with float64."""
    x, codebook = x.detach().requires_grad_(), codebook.detach().requires_grad_()
    output = quantize(x, codebook, metric=metric, mask=mask, gradient=gradient, packed=packed)
    kept = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    grad_quantized = torch.randn(x.shape, generator=generator(9)).to(x.dtype)
    expected = quantize_formulas(
        x.detach(),
        codebook.detach(),
        output.indices,
        kept=kept,
        grad_quantized=grad_quantized,
        grad_commitment=_COMMITMENT,
        grad_codebook_loss=_CODEBOOK,
        gradient=gradient,
    )
    check_forward(output, x, codebook, expected)
    searched = nearest_code(x.detach(), codebook.detach(), metric=metric)
    assert torch.equal(output.indices, searched.masked_fill(~kept, -1))
    if x.numel() == 0:
        return output

    total = _COMMITMENT * output.commitment_loss + _CODEBOOK * output.codebook_loss
    straight = torch.where(output.indices[..., None] >= 0, output.quantized, 0.0)
    (total + (straight * grad_quantized).sum()).backward()
    assert x.grad is not None
    assert codebook.grad is not None
    assert (x.grad.dtype, codebook.grad.dtype) == (x.dtype, codebook.dtype)
    assert_rounded(x.grad, expected.grad_x, expected.grad_x_terms)
    assert_rounded(codebook.grad, expected.grad_codebook, expected.grad_codebook_terms)
    return output


def check_forward(output: QuantizeOutput, x: Tensor, codebook: Tensor, expected: Quantized) -> None:
    assert output.quantized.dtype == x.dtype
    assert output.quantized.shape == x.shape
    rounded = expected.quantized.to(codebook.dtype).to(x.dtype)
    assert torch.equal(output.quantized.nan_to_num(nan=1e3), rounded.nan_to_num(nan=1e3))
    assert output.counts.dtype == torch.float32
    assert torch.equal(output.counts.double(), expected.counts)
    for loss in (output.commitment_loss, output.codebook_loss):
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-6, atol=1e-30)
