"""One training step of a `VectorQuantize` layer, against the package vector-quantize-pytorch.

A step is forward, backward of a loss on the quantized vectors plus the commitment loss, and the
moving-average update of the book. Both layers get the same arguments and start from one state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bench_nearest_code import random_problem
from .case import OURS, Check, Provider, Variant
from .checks import check_indices
from .shapes import CodebookShape, codebook_shape

PEER = "vector-quantize-pytorch"
TRAINING_STEP = "training step"
DECAY = 0.8
EPS = 1e-5
COMMITMENT_WEIGHT = 1.0
BATCH = 8


@dataclass(frozen=True)
class Step:
    """What every provider starts from: x `[B, N / B, D]`, the book and the loss's weights."""

    x: Tensor
    codebook: Tensor
    loss_weights: Tensor
    cosine: bool


@dataclass(frozen=True)
class StepResult:
    quantized: Tensor
    indices: Tensor
    x_gradient: Tensor | None
    codebook: Tensor


@dataclass(frozen=True)
class VectorQuantizeCase:
    row: CodebookShape
    tokens: int
    default: bool = True
    quick: bool = False
    mode: str = TRAINING_STEP
    dtype: str = "float32"
    op: str = "vector_quantize"

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def shape(self) -> str:
        capped = f" (of {self.row.tokens})" if self.tokens < self.row.tokens else ""
        return f"N{self.tokens}{capped} D{self.row.dim} K{self.row.codebook_size} {self.row.metric}"

    @property
    def operations(self) -> float:
        """The search's; sums, losses and updates are of lower order."""
        return 2.0 * self.tokens * self.row.dim * self.row.codebook_size

    @property
    def bytes_moved(self) -> float:
        """x and its gradient's seed are read, quantized and the gradient written, indices written;
        of the book, its sums and its counts all are read and written once."""
        elements, book = self.tokens * self.row.dim, self.row.codebook_size * self.row.dim
        return 4.0 * (4 * elements + 4 * book + 2 * self.row.codebook_size) + 8.0 * self.tokens

    def inputs(self, data: str) -> Step:
        x, codebook = random_problem(self.row, self.tokens, data)
        cosine = self.row.metric == "cosine"
        if cosine:
            codebook = F.normalize(codebook, dim=-1)
        x = x.view(BATCH, self.tokens // BATCH, self.row.dim)
        return Step(x, codebook, torch.rand(x.shape[-1]), cosine)

    def providers(self) -> tuple[Provider, ...]:
        return (
            Provider(OURS, (Variant("", lambda step: bind_step(our_layer(step), step)),)),
            Provider(PEER, (Variant("", lambda step: bind_step(peer_layer(step), step)),)),
        )

    def keep(self, output: StepResult) -> StepResult:
        return replace(output, codebook=output.codebook.clone())

    def check(self, inputs: Step, outputs: Mapping[str, Any]) -> dict[str, Check]:
        rows = inputs.x.flatten(0, 1)
        metric = "cosine" if inputs.cosine else "l2"
        indices = {name: result.indices.flatten() for name, result in outputs.items()}
        checks = check_indices(rows, inputs.codebook, metric, indices)
        for name, result in outputs.items():
            difference = "" if checks[name].refusal else _difference(inputs, result)
            if difference:
                checks[name] = Check(checks[name].checked, checks[name].mismatches, difference)
        return checks

    def packed_bytes(self, inputs: Step) -> None:
        return None


def arguments(step: Step) -> dict[str, Any]:
    """Constructor arguments. The peer's default gradient, the rotation trick, would slow it."""
    return {
        "dim": step.codebook.shape[1],
        "codebook_size": step.codebook.shape[0],
        "decay": DECAY,
        "eps": EPS,
        "commitment_weight": COMMITMENT_WEIGHT,
        "use_cosine_sim": step.cosine,
        "rotation_trick": False,
    }


def our_layer(step: Step) -> nn.Module:
    from vqkernels.nn import VectorQuantize

    return with_book(VectorQuantize(**arguments(step)), step.codebook)


def peer_layer(step: Step) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    return with_book(VectorQuantize(**arguments(step)), step.codebook)


def with_book(layer: nn.Module, codebook: Tensor) -> nn.Module:
    """Starts both layers, whose state has the same keys, from `codebook` with counts of one."""
    state = layer.state_dict()
    state["_codebook.embed"] = codebook[None].clone()
    state["_codebook.embed_avg"] = codebook[None].clone()
    layer.load_state_dict(state)
    return layer.train()


def bind_step(layer: nn.Module, step: Step) -> Callable[[], StepResult]:
    x = step.x.clone().requires_grad_()
    book = layer.get_buffer("_codebook.embed")

    def call() -> StepResult:
        x.grad = None
        quantized, indices, commitment = layer(x)
        loss = (quantized * step.loss_weights).sum() + commitment.sum()
        loss.backward()
        return StepResult(quantized, indices, x.grad, book)

    return call


def _difference(step: Step, result: StepResult) -> str:
    """Compares a first step with its formulas in float64, given its own indices; "" if equal."""
    expected = expected_step(step, result.indices)
    for field in ("quantized", "x_gradient", "codebook"):
        got = getattr(result, field).detach().double().reshape(getattr(expected, field).shape)
        error = (got - getattr(expected, field)).abs().max().item()
        largest = getattr(expected, field).abs().max().item()
        if not error <= 1e-4 * largest:
            return f"{field} differs by {error:.2g} (largest value {largest:.2g})"
    return ""


def expected_step(step: Step, indices: Tensor) -> StepResult:
    """Straight-through quantization and the Laplace-smoothed moving average, in float64.

    counts' = decay counts + (1 - decay) n_k, sums likewise, and
    book = sums' / ((counts' + eps) / (total + K eps) * total), total = sum of counts'.
    """
    x = step.x.double().requires_grad_()
    rows = F.normalize(x, dim=-1) if step.cosine else x
    book = step.codebook.double()
    size = book.shape[0]
    quantized = book[indices]
    straight_through = rows + (quantized - rows).detach()
    commitment = COMMITMENT_WEIGHT * F.mse_loss(rows, quantized)
    ((straight_through * step.loss_weights.double()).sum() + commitment).backward()

    flat = indices.flatten()
    counts = torch.bincount(flat, minlength=size).double()
    sums = torch.zeros_like(book).index_add_(0, flat, rows.detach().flatten(0, 1))
    counts = DECAY + (1 - DECAY) * counts
    sums = DECAY * book + (1 - DECAY) * sums
    total = counts.sum()
    updated = sums / ((counts + EPS) / (total + size * EPS) * total)[:, None]
    if step.cosine:
        updated = F.normalize(updated, dim=-1)
    return StepResult(straight_through.detach(), indices, x.grad, updated)


CASES: tuple[VectorQuantizeCase, ...] = (
    VectorQuantizeCase(codebook_shape("taming-f16", 1024), 4096, quick=True),
    VectorQuantizeCase(codebook_shape("llamagen"), 4096),
    VectorQuantizeCase(codebook_shape("vit-vqgan"), 4096),
    VectorQuantizeCase(codebook_shape("musicgen"), 3200),
    VectorQuantizeCase(codebook_shape("taming-f16", 16384), 3072, default=False),
    VectorQuantizeCase(codebook_shape("ldm-f4"), 4096, default=False),
)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.name} {c.shape}") for c in CASES if c.default]
)
def test_vector_quantize_step(benchmark: Any, case: VectorQuantizeCase) -> None:
    step = case.inputs("gaussian")
    call = bind_step(our_layer(step), step)
    check = case.check(step, {OURS: case.keep(call())})[OURS]
    assert not check.refusal
    benchmark.extra_info["operations"] = case.operations
    benchmark(call)
