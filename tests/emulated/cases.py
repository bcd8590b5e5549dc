"""Small calls that together take every path of the CUDA kernels, each with its check.

`cases()` is what runs in every order, under every sanitizer, and with one barrier taken out.
"""

from __future__ import annotations

from collections.abc import Callable

import attention_cases
import modulation_cases
import noise_cases
import torch
from _helpers import data, exact, formulas
from cuda_calls import HOPPER, SMALL, Case, CudaCalls, Device
from torch import Tensor

import vqkernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check_nearest(calls: CudaCalls, x: Tensor, codebook: Tensor, metric: str, **more) -> Tensor:
    """The index of every row, checked book by book against float64."""
    indices = calls.nearest_code(x, codebook, metric, **more)
    for rows, book, found in per_book(x, codebook, indices):
        exact.assert_nearest(rows, book, found, metric)
    return indices


def per_book(x: Tensor, codebook: Tensor, indices: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    if codebook.dim() == 2:
        return [(x.flatten(0, -2), codebook, indices.flatten())]
    return [
        (x[..., g, :, :].flatten(0, -2), codebook[g], indices[..., g, :].flatten())
        for g in range(len(codebook))
    ]


def _nearest(
    name: str,
    rows: int,
    codes: int,
    dim: int,
    dtype: torch.dtype = FP32,
    metric: str = "l2",
    kind: str = "gaussian",
    device: Device = HOPPER,
    **more,
) -> Case:
    def run(calls: CudaCalls) -> None:
        x, codebook = data.make(kind, rows, codes, dim)
        check_nearest(calls, x.to(dtype), codebook.to(dtype), metric, **more)

    return Case(f"nearest-{name}", run, device)


def _books(calls: CudaCalls) -> None:
    x = torch.randn(2, 3, 70, 24, generator=data.generator(0))
    codebook = torch.randn(3, 150, 24, generator=data.generator(1))
    check_nearest(calls, x, codebook, "l2")


def _channel_first(calls: CudaCalls) -> None:
    x = torch.randn(2, 20, 5, 9, generator=data.generator(0)).permute(0, 2, 3, 1)[:, :, 1:]
    codebook = torch.randn(140, 40, generator=data.generator(1))[:, ::2]
    check_nearest(calls, x, codebook, "l2")


def _crowded(warpgroups: int) -> Callable[[CudaCalls], None]:
    """Thirty codes around each of ten places, closer together than the screen can tell."""

    def run(calls: CudaCalls) -> None:
        places = torch.randn(10, 40, generator=data.generator(0))
        codebook = places.repeat(30, 1)
        codebook += 1e-4 * torch.randn(codebook.shape, generator=data.generator(1))
        x = places.repeat(8, 1) + 0.1 * torch.randn(80, 40, generator=data.generator(2))
        check_nearest(calls, x, codebook, "l2", warpgroups=warpgroups)

    return run


def _broken(calls: CudaCalls) -> None:
    for dtype in (FP32, FP16):
        x, codebook = (part.to(dtype) for part in data.make("gaussian", 40, 140, 16))
        x[3, 5], x[17, 0], x[39, 15] = torch.nan, torch.inf, -torch.inf
        codebook[::3, 2], codebook[1, 0] = torch.nan, -torch.inf
        for metric in ("l2", "dot", "cosine"):
            indices = calls.nearest_code(x, codebook, metric)
            good = x.isfinite().all(-1)
            assert (indices[~good] == -1).all()
            exact.assert_nearest(x[good], codebook, indices[good], metric)
        assert (calls.nearest_code(x, torch.full_like(codebook, torch.nan)) == -1).all()


def _quantize(
    name: str,
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    dim: int = 24,
    gradient: str = "straight_through",
    metric: str = "l2",
    masked: bool = False,
    books: int = 0,
    rows: int = 150,
    codes: int = 30,
) -> Case:
    def run(calls: CudaCalls) -> None:
        generator = data.generator(0)
        groups = (books,) if books else ()
        x = torch.randn(*groups, rows, dim, generator=generator).to(dtypes[0])
        codebook = torch.randn(*groups, codes, dim, generator=generator).to(dtypes[1])
        x[..., 7, 0] = torch.nan
        mask = torch.rand(x.shape[:-1], generator=generator) < 0.7 if masked else None
        check_quantize(calls, x, codebook, metric, mask, gradient)

    return Case(f"quantize-{name}", run)


def check_quantize(
    calls: CudaCalls,
    x: Tensor,
    codebook: Tensor,
    metric: str = "l2",
    mask: Tensor | None = None,
    gradient: str = "straight_through",
) -> None:
    """Forward and backward against float64."""
    from _helpers.quantizing import assert_rounded, check_forward

    kept = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    output = vqkernels.QuantizeOutput(*calls.quantize(x, codebook, metric, mask))
    with vqkernels.use_backend("reference"):
        searched = vqkernels.nearest_code(x, codebook, metric=metric)
    assert torch.equal(output.indices, searched.masked_fill(~kept, -1))
    grad = torch.randn(x.shape, generator=data.generator(9)).to(x.dtype)
    expected = formulas.quantize_formulas(
        x,
        codebook,
        output.indices,
        kept=kept,
        grad_quantized=grad,
        grad_commitment=0.25,
        grad_codebook_loss=1.5,
        gradient=gradient,
    )
    check_forward(output, x, codebook, expected)
    grad_x = calls.quantize_backward_x(
        grad, torch.tensor(0.25), x, codebook, output.indices, gradient
    )
    assert_rounded(grad_x, expected.grad_x, expected.grad_x_terms)
    alone = calls.quantize_backward_x(grad, None, x, codebook, output.indices, gradient)
    by_reference = torch.ops.vqkernels.quantize_backward_x(
        grad, None, x, codebook, output.indices, gradient, "reference"
    )
    torch.testing.assert_close(alone, by_reference, rtol=1e-2, atol=1e-2)
    grad_codebook = calls.quantize_backward_codebook(torch.tensor(1.5), x, codebook, output.indices)
    assert_rounded(grad_codebook, expected.grad_codebook, expected.grad_codebook_terms)


def _collapsed_book(calls: CudaCalls) -> None:
    """One code has all rows, over several chunks; another none; some rows have no code."""
    x = torch.randn(300, 5, generator=data.generator(0))
    codebook = torch.randn(3, 5, generator=data.generator(1))
    for indices in (
        torch.ones(300, dtype=torch.int64),
        torch.full((300,), -1, dtype=torch.int64),
        torch.arange(300) // 128,
        torch.cat([torch.full((70,), -1), torch.ones(150), torch.full((80,), 2)]).long(),
    ):
        grad = calls.quantize_backward_codebook(torch.tensor(2.0), x, codebook, indices)
        expected = torch.ops.vqkernels.quantize_backward_codebook(
            torch.tensor(2.0), x, codebook, indices, "reference"
        )
        torch.testing.assert_close(grad, expected, rtol=2e-6, atol=1e-7)


def cases() -> list[Case]:
    """Fast enough to run some hundred times."""
    return [
        _nearest("three-terms", 70, 300, 8),
        _nearest("three-terms-warps", 70, 300, 8, warpgroups=1),
        _nearest("many-chunks", 70, 140, 200, kind="midpoints", warpgroups=1),
        _nearest("warpgroups-whole", 130, 1100, 256, FP16),
        _nearest("warpgroups-tails", 70, 620, 136, BF16, "dot"),
        _nearest("warpgroups-screened", 140, 700, 120, kind="midpoints", splits=2),
        _nearest("warpgroups-cosine", 70, 300, 64, FP16, "cosine"),
        _nearest("two-stages", 70, 300, 72, device=SMALL),
        _nearest("streamed", 70, 140, 264, FP16),
        _nearest("streamed-two-stages", 70, 140, 264, device=SMALL),
        _nearest("tall", 300, 140, 136, warpgroups=1),
        _nearest("streamed-for-room", 70, 140, 200, device=SMALL),
        _nearest("direct-bf16", 130, 260, 24, BF16, "dot", warpgroups=1),
        _nearest("direct-fp16", 70, 300, 64, FP16, warpgroups=1),
        _nearest("splits", 20, 700, 20, metric="cosine", splits=3),
        _nearest("duplicates", 70, 300, 16, kind="duplicated"),
        _nearest("near-ties", 100, 300, 40, kind="neighbours"),
        _nearest("collapsed", 20, 300, 40, kind="collapsed"),
        Case("nearest-crowded", _crowded(2)),
        Case("nearest-crowded-warps", _crowded(1)),
        Case("nearest-books", _books),
        Case("nearest-channel-first", _channel_first),
        Case("nearest-broken", _broken),
        _quantize("fp32"),
        _quantize("odd", dim=3, masked=True, gradient="rotation"),
        _quantize("half", (FP16, FP16), dim=40, metric="cosine", gradient="rotation"),
        _quantize("mixed", (BF16, FP32), dim=17, books=2, rows=90, gradient="none", masked=True),
        Case("book-gradient", _collapsed_book),
        *(Case(f"attention-{name}", run) for name, run in attention_cases.RUNS.items()),
        *modulation_cases.cases(),
        *noise_cases.cases(),
    ]
