"""Small calls that together take every path of the CUDA modulation kernels, each with its check."""

from __future__ import annotations

from collections.abc import Callable

import modulation_calls
import torch
from _helpers.data import generator
from _helpers.modulation import eager_fused, eager_gate, eager_norm
from _helpers.precision import assert_rounded_once, forward_and_backward, judge
from cuda_calls import Case, CudaCalls
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Draw:
    """Random tensors, the same ones for each seed."""

    def __init__(self, dtype: torch.dtype = FP32, seed: int = 0) -> None:
        self._dtype, self._generator = dtype, generator(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(dtype or self._dtype)

    def vector(self, batch: int, frames: int, dim: int) -> Tensor:
        return self(batch, frames, dim) if frames else self(batch, dim)


def _norm(
    name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype = FP32,
    norm: str = "layer",
    frames: tuple[int, int] = (0, 0),
    affine: str = "",
) -> Case:
    """`frames`: of shift and scale, 0 for `[B, D]`; `affine`: of "w" and "b"."""

    def run(calls: CudaCalls) -> None:
        draw, (batch, _, dim) = Draw(dtype), shape
        x, grad = draw(*shape) + 0.5, draw(*shape)
        shift, scale = (draw.vector(batch, of, dim) for of in frames)
        given = [draw(dim) for _ in affine]
        ours, eager = modulation_calls.norm(calls, norm), eager_norm(norm)
        weight, bias = (affine.index(of) if of in affine else None for of in "wb")

        def of_all(function: Callable[..., Tensor], missing: bool) -> Callable[..., Tensor]:
            def call(x: Tensor, shift: Tensor, scale: Tensor, *rows: Tensor) -> Tensor:
                one = None if missing else torch.ones(dim, dtype=x.dtype)
                none = None if missing else torch.zeros(dim, dtype=x.dtype)
                return function(
                    x,
                    shift,
                    scale,
                    one if weight is None else rows[weight],
                    none if bias is None else rows[bias],
                )

            return call

        judge(of_all(ours, True), of_all(eager, False), (x, shift, scale, *given), [grad])

    return Case(f"modulation-norm-{name}", run)


def _gate(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype = FP32, frames: int = 0
) -> Case:
    def run(calls: CudaCalls) -> None:
        draw = Draw(dtype)
        residual, x, grad = (draw(*shape) for _ in range(3))
        gate = draw.vector(shape[0], frames, shape[2])
        judge(modulation_calls.gate(calls), eager_gate, (residual, x, gate), [grad])

    return Case(f"modulation-gate-{name}", run)


def _fused(
    name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype = FP32,
    norm: str = "layer",
    frames: tuple[int, int, int] = (0, 0, 0),
) -> Case:
    def run(calls: CudaCalls) -> None:
        draw, (batch, _, dim) = Draw(dtype), shape
        residual, x, *grads = (draw(*shape) for _ in range(4))
        vectors = (draw.vector(batch, of, dim) for of in frames)
        ours, eager = modulation_calls.fused(calls, norm), eager_fused(norm)
        judge(ours, eager, (residual, x, *vectors), grads)

    return Case(f"modulation-fused-{name}", run)


def _mixed(
    name: str, stream: torch.dtype, branch: torch.dtype, vectors: torch.dtype, dim: int
) -> Case:
    """Each argument in a dtype of its own: one rounding each."""

    def run(calls: CudaCalls) -> None:
        draw = Draw()
        residual, grad, passed = (draw(2, 11, dim, dtype=stream) for _ in range(3))
        x = draw(2, 11, dim, dtype=branch)
        gate, shift, scale = draw(2, 3 * dim, dtype=vectors).chunk(3, dim=1)
        affine = draw(dim, dtype=vectors), draw(dim, dtype=FP32)
        for ours, eager, inputs, grads in (
            (modulation_calls.norm(calls, "layer"), eager_norm("layer"),
             (residual, shift, scale, *affine), [grad]),
            (modulation_calls.gate(calls), eager_gate, (residual, x, gate), [grad]),
        ):  # fmt: skip
            found = forward_and_backward(ours, inputs, grads)
            wide = [t.double() for t in inputs]
            exact = forward_and_backward(eager, wide, [g.double() for g in grads])
            assert [t.dtype for t in found] == [stream, *(t.dtype for t in inputs)]
            assert_rounded_once(found, exact)
        inputs = (residual, x, gate, shift, scale)
        found = forward_and_backward(modulation_calls.fused(calls, "rms"), inputs, [grad, passed])
        # What is normalized is the rounded sum, so the exact results start from it.
        wide = [t.double().requires_grad_() for t in inputs]
        summed = eager_gate(*wide[:3])
        rounded = summed + (summed.to(stream).double() - summed).detach()
        normed = eager_norm("rms")(rounded, *wide[3:])
        grads = torch.autograd.grad((normed, summed), wide, (grad.double(), passed.double()))
        assert_rounded_once(found, [normed, rounded, *grads])

    return Case(f"modulation-mixed-{name}", run)


def _views(calls: CudaCalls) -> None:
    """Tokens and vectors inside wider tensors: of even strides, and such that no piece is whole."""
    for dtype, start, width in ((FP32, 4, 8), (BF16, 1, 3)):
        draw, dim = Draw(dtype), 24
        residual, x, *grads = (
            draw(3, 20, dim + width).transpose(0, 1)[..., start : start + dim] for _ in range(4)
        )
        vectors = draw(20, 3 * dim + width)[:, start : start + 3 * dim].chunk(3, dim=1)
        inputs = (residual, x, *vectors)
        judge(modulation_calls.fused(calls, "layer"), eager_fused("layer"), inputs, grads)
        judge(modulation_calls.norm(calls, "layer"), eager_norm("layer"),
              (x, *vectors[1:]), grads)  # fmt: skip
        judge(modulation_calls.gate(calls), eager_gate, inputs[:3], grads)


def _far_mean(calls: CudaCalls) -> None:
    """A mean far above the deviation costs no digits, nor does a stream's rounding count twice."""
    draw, zero = Draw(), torch.zeros(1, 40)
    x = draw(1, 3, 40) + 1e5
    out = modulation_calls.norm(calls, "layer")(x, zero, zero)
    assert (out.double() - eager_norm("layer")(x.double(), zero, zero)).abs().max() <= 2e-6

    draw = Draw(BF16)
    residual, branch = draw(1, 3, 40) + 256, draw(1, 3, 40)
    gate, shift, scale = (draw(1, 40) for _ in range(3))
    normed, stream = modulation_calls.fused(calls, "layer")(residual, branch, gate, shift, scale)
    exact = eager_norm("layer")(stream.double(), shift.double(), scale.double())
    assert_rounded_once([normed], [exact])


def _one_gradient(calls: CudaCalls) -> None:
    """Nothing passes by the norm."""
    draw = Draw()
    for dim in (36, 9):
        residual, x, grad = (draw(2, 9, dim) for _ in range(3))
        vectors = [draw(2, dim) for _ in range(3)]
        ours, eager = modulation_calls.fused(calls, "layer"), eager_fused("layer")
        judge(lambda *t: ours(*t)[0], lambda *t: eager(*t)[0], (residual, x, *vectors), [grad])  # noqa: B023


def cases() -> list[Case]:
    """Fast enough to run some hundred times."""
    return [
        _norm("groups", (2, 13, 40)),
        _norm("groups-halves", (1, 21, 264), BF16, "rms", affine="wb"),
        _norm("warps", (1, 9, 520), affine="b"),
        _norm("warps-halves", (1, 3, 1288), FP16, "rms", affine="w"),
        _norm("most-pieces", (1, 2, 508), affine="w"),
        _norm("rows-ahead", (1, 60, 520), affine="b"),
        _norm("odd", (2, 11, 35), BF16, affine="wb"),
        _norm("odd-rms", (1, 3, 1), norm="rms"),
        _norm("wide", (1, 2, 8200)),
        _norm("many-chunks", (1, 148, 8), frames=(0, 0), affine="wb"),
        _norm("frames", (2, 12, 16), BF16, frames=(4, 6), affine="wb"),
        _norm("tokens", (2, 5, 24), FP16, frames=(5, 0)),
        _norm("all-tokens", (2, 3, 16), BF16, frames=(3, 3)),
        _gate("rows", (2, 19, 72)),
        _gate("columns", (1, 5, 2056)),
        _gate("columns-halves", (1, 3, 4104), BF16),
        _gate("odd", (2, 9, 33), FP16, frames=3),
        _fused("groups", (2, 21, 40), frames=(0, 3, 1)),
        _fused("warps", (1, 4, 1288), BF16, "rms"),
        _fused("most-pieces", (1, 2, 1272), FP16),
        _fused("rows-ahead", (1, 200, 40), BF16),
        _fused("odd", (2, 13, 37), frames=(13, 0, 0)),
        _mixed("float-stream", FP32, BF16, FP16, 56),
        _mixed("float-stream-halves", FP32, FP16, FP32, 132),
        _mixed("half-stream", BF16, FP32, FP32, 40),
        _mixed("halves", FP16, BF16, FP16, 16),
        Case("modulation-far-mean", _far_mean),
        Case("modulation-views", _views),
        Case("modulation-one-gradient", _one_gradient),
    ]
