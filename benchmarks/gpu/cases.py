"""The rows that are measured on a GPU, by stage, and how each is measured.

`N65536` rows are those of the project's targets; the others are real models' (shapes.py), uncapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vqkernels
from benchmarks.bench_nearest_code import random_problem
from benchmarks.bench_vector_quantize import (
    BATCH,
    PEER,
    Step,
    VectorQuantizeCase,
    bind_step,
    our_layer,
    peer_layer,
)
from benchmarks.case import OURS, Check, Provider, Variant
from benchmarks.checks import check_indices
from benchmarks.shapes import CodebookShape, codebook_shape

from .attention import CASES as ATTENTION_CASES
from .attention import AttentionCase
from .device import Device, our_backends
from .modulation import CASES as MODULATION_CASES
from .modulation import ModulationCase
from .noise import CASES as NOISE_CASES
from .noise import NoiseCase
from .peers import Lookup, launched, ours, peers, rounds_scores
from .timing import COLD, WARM

HALF, FP32, SMALL, LAUNCHES, QUANTIZER = (
    "bench-codebook-half",
    "bench-codebook-fp32",
    "bench-codebook-small",
    "bench-launches",
    "bench-quantizer",
)
STEP = "training step"
EAGER = "eager formulas"
_DRY_TOKENS = 96


@dataclass(frozen=True)
class LookupCase:
    """`nearest_code` on one shape. `book_dtype` is x's unless given."""

    stage: str
    row: CodebookShape
    dtype: str
    book_dtype: str = ""
    data: str = "gaussian"
    compiled: bool = False
    op: str = "nearest_code"
    modes: tuple[str, ...] = (COLD, WARM)

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def shape(self) -> str:
        return f"N{self.row.tokens} D{self.row.dim} K{self.row.codebook_size} {self.row.metric}"

    @property
    def dtypes(self) -> str:
        return f"{self.dtype}, {self.book_dtype} book" if self.book_dtype else self.dtype

    @property
    def key(self) -> str:
        return f"{self.name} {self.shape} {self.dtypes} {self.data}"

    @property
    def operations(self) -> float:
        return 2.0 * self.row.tokens * self.row.dim * self.row.codebook_size

    @property
    def scores(self) -> float:
        return float(self.row.tokens * self.row.codebook_size)

    @property
    def bytes_moved(self) -> float:
        """x and the book are read once, int64 indices are written once."""
        x_size, book_size = (
            torch.finfo(getattr(torch, name)).bits // 8
            for name in (self.dtype, self.book_dtype or self.dtype)
        )
        tokens, dim, size = self.row.tokens, self.row.dim, self.row.codebook_size
        return float(dim * (tokens * x_size + size * book_size) + 8 * tokens)

    def inputs(self, device: Device) -> Lookup:
        x, codebook = random_problem(self.row, self.row.tokens, self.data)
        x = x.to(device.kind, getattr(torch, self.dtype))
        codebook = codebook.to(device.kind, getattr(torch, self.book_dtype or self.dtype))
        return Lookup(x, codebook, self.row.metric)

    def providers(self, device: Device) -> tuple[Provider, ...]:
        mine = tuple(map(ours, our_backends(device.dry)))
        half = self.dtype != "float32" and not self.book_dtype
        return mine + peers(self.row.metric, half=half, compiled=self.compiled)

    def keep(self, output: Tensor) -> Tensor:
        return output.reshape(-1).long()

    def check(self, inputs: Lookup, outputs: Mapping[str, Any], device: Device) -> dict[str, Check]:
        rounding = torch.finfo(inputs.x.dtype).eps / 2
        half = inputs.x.dtype != torch.float32 and inputs.x.dtype == inputs.codebook.dtype
        return check_indices(
            inputs.x,
            inputs.codebook,
            inputs.metric,
            outputs,
            every_row=not device.dry,
            rounding={n: rounding for n in outputs if half and rounds_scores(n)},
        )

    def shrunk(self) -> LookupCase:
        return dataclasses.replace(self, row=_shrunk(self.row))


@dataclass(frozen=True)
class LaunchCase(LookupCase):
    """The CUDA search with every choice of its launch, beside what it chooses itself."""

    op: str = "nearest_code launches"
    modes: tuple[str, ...] = (WARM,)

    @property
    def key(self) -> str:
        return f"launches {super().key}"

    def providers(self, device: Device) -> tuple[Provider, ...]:
        mine = tuple(map(ours, our_backends(device.dry)))
        by_warps = [(rows, stages) for rows in (128, 256) for stages in (2, 3)]
        return (
            *mine,
            *(launched(rows, stages, warpgroups=False) for rows, stages in by_warps),
            launched(0, 0, warpgroups=True),
        )


@dataclass(frozen=True)
class StepCase:
    """One training step of a VectorQuantize layer, ours against the peer's."""

    stage: str
    row: CodebookShape
    data: str = "gaussian"
    op: str = "vector_quantize"
    dtype: str = "float32"
    modes: tuple[str, ...] = (COLD,)

    @property
    def _case(self) -> VectorQuantizeCase:
        return VectorQuantizeCase(self.row, self.row.tokens)

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def shape(self) -> str:
        return self._case.shape

    @property
    def dtypes(self) -> str:
        return self.dtype

    @property
    def key(self) -> str:
        return f"{self.op} {self.name} {self.shape}"

    @property
    def operations(self) -> float:
        return self._case.operations

    @property
    def scores(self) -> float:
        return float(self.row.tokens * self.row.codebook_size)

    @property
    def bytes_moved(self) -> float:
        return self._case.bytes_moved

    def inputs(self, device: Device) -> Step:
        step = self._case.inputs(self.data)
        return Step(
            step.x.to(device.kind),
            step.codebook.to(device.kind),
            step.loss_weights.to(device.kind),
            step.cosine,
        )

    def providers(self, device: Device) -> tuple[Provider, ...]:
        """Ours by the automatic choice: a step also runs ops that not every backend has."""

        def bind(layer: Callable[[Step], nn.Module]) -> Callable[[Step], Callable[[], Any]]:
            return lambda step: bind_step(layer(step).to(device.kind), step)

        x = torch.empty(self.row.tokens, self.row.dim, device=device.kind)
        book = torch.empty(self.row.codebook_size, self.row.dim, device=device.kind)
        chosen = vqkernels.explain("quantize", x, book).backend
        mine = Provider(OURS, (Variant(f"automatic: {chosen}", bind(our_layer)),))
        return mine, Provider(PEER, (Variant("", bind(peer_layer)),))

    def keep(self, output: Any) -> Any:
        return self._case.keep(output)

    def check(self, inputs: Step, outputs: Mapping[str, Any], device: Device) -> dict[str, Check]:
        return self._case.check(inputs, outputs)

    def shrunk(self) -> StepCase:
        return dataclasses.replace(self, row=_shrunk(self.row))


@dataclass(frozen=True)
class QuantizeCase(LookupCase):
    """`quantize` forward and backward, against the same formulas in eager PyTorch."""

    op: str = "quantize"
    modes: tuple[str, ...] = (COLD,)

    @property
    def key(self) -> str:
        return f"{self.op} {super().key}"

    @property
    def bytes_moved(self) -> float:
        """x and the arriving gradient are read, quantized and x's gradient written; the book is
        read and its gradient written."""
        size = torch.finfo(getattr(torch, self.dtype)).bits // 8
        tokens, dim = self.row.tokens, self.row.dim
        return float(size * dim * (4 * tokens + 2 * self.row.codebook_size) + 8 * tokens)

    def providers(self, device: Device) -> tuple[Provider, ...]:
        mine = [
            Provider(f"{OURS}-{backend}", (Variant("", _bind_quantize(backend)),))
            for backend in our_backends(device.dry)
        ]
        return (*mine, Provider(EAGER, (Variant("", _bind_eager),)))

    def check(self, inputs: Lookup, outputs: Mapping[str, Any], device: Device) -> dict[str, Check]:
        rounding = torch.finfo(inputs.x.dtype).eps / 2 if self.dtype != "float32" else 0.0
        return check_indices(
            inputs.x,
            inputs.codebook,
            inputs.metric,
            outputs,
            every_row=not device.dry,
            rounding={EAGER: rounding},
        )


def _bind_quantize(backend: str) -> Callable[[Lookup], Callable[[], Tensor]]:
    def bind(problem: Lookup) -> Callable[[], Tensor]:
        x = problem.x.detach().requires_grad_()
        book = problem.codebook.detach().requires_grad_()
        arriving = torch.ones_like(x)

        def call() -> Tensor:
            x.grad = book.grad = None
            with vqkernels.use_backend(backend):
                out = vqkernels.quantize(x, book)
                loss = 0.25 * out.commitment_loss + out.codebook_loss
                torch.autograd.backward([out.quantized, loss], [arriving, torch.ones_like(loss)])
            return out.indices

        return call

    return bind


def _bind_eager(problem: Lookup) -> Callable[[], Tensor]:
    x = problem.x.detach().requires_grad_()
    book = problem.codebook.detach().requires_grad_()
    arriving = torch.ones_like(x)

    def call() -> Tensor:
        x.grad = book.grad = None
        with torch.no_grad():
            norms = book.square().sum(-1)
            indices = torch.addmm(norms, x, book.T, alpha=-2).argmin(-1)
        code = F.embedding(indices, book)
        loss = 0.25 * F.mse_loss(x, code.detach()) + F.mse_loss(code, x.detach())
        quantized = x + (code - x).detach()
        torch.autograd.backward([quantized, loss], [arriving, torch.ones_like(loss)])
        return indices

    return call


Case = LookupCase | StepCase | ModulationCase | AttentionCase | NoiseCase


def _shrunk(row: CodebookShape) -> CodebookShape:
    """A shape for a dry run; different rows stay different."""
    return dataclasses.replace(
        row,
        tokens=max(BATCH, min(row.tokens, _DRY_TOKENS)),
        dim=row.dim if row.dim <= 16 else row.dim // 8 + 1,
        codebook_size=32 + row.codebook_size // 512,
        tokens_cap=None,
    )


def _target(dim: int, codebook_size: int) -> CodebookShape:
    return CodebookShape("target", 65536, dim, codebook_size, "l2", "the project's targets")


def _lookups() -> list[Case]:
    shape = codebook_shape
    few = next(s for s in _all("streaming") if s.tokens == 256)
    return [
        LookupCase(HALF, _target(256, 1024), "float16", compiled=True),
        LookupCase(HALF, _target(256, 16384), "float16"),
        LookupCase(HALF, _target(64, 1024), "float16"),
        LookupCase(HALF, _target(64, 16384), "float16"),
        LookupCase(HALF, _target(256, 16384), "bfloat16"),
        LookupCase(HALF, _target(64, 1024), "bfloat16"),
        LookupCase(HALF, shape("simvq", 262144), "bfloat16"),
        LookupCase(HALF, few, "float16"),
        LookupCase(HALF, _target(256, 1024), "bfloat16", book_dtype="float32"),
        LookupCase(FP32, _target(256, 1024), "float32", compiled=True),
        LookupCase(FP32, _target(256, 16384), "float32"),
        LookupCase(FP32, _target(256, 16384), "float32", data="clustered"),
        LookupCase(FP32, _target(64, 1024), "float32"),
        LookupCase(FP32, _target(64, 16384), "float32"),
        LookupCase(FP32, shape("vit-vqgan"), "float32"),
        LookupCase(FP32, shape("ibq"), "float32"),
        LookupCase(FP32, shape("kv-cache"), "float32"),
        LookupCase(FP32, few, "float32"),
        LookupCase(SMALL, _target(8, 16384), "float32", compiled=True),
        LookupCase(SMALL, _target(8, 16384), "float16"),
        LookupCase(SMALL, shape("llamagen"), "float32"),
        LookupCase(SMALL, shape("ldm-f4"), "float32"),
        LookupCase(SMALL, shape("emu3"), "float32"),
        LookupCase(SMALL, shape("dac-44k"), "float32"),
        LookupCase(SMALL, shape("best-rq"), "float32"),
        LaunchCase(LAUNCHES, _target(256, 1024), "float16"),
        LaunchCase(LAUNCHES, _target(256, 16384), "float16"),
        LaunchCase(LAUNCHES, _target(64, 1024), "float16"),
        LaunchCase(LAUNCHES, _target(64, 16384), "float16"),
        LaunchCase(LAUNCHES, _target(256, 16384), "float32"),
        LaunchCase(LAUNCHES, _target(64, 16384), "float32"),
        LaunchCase(LAUNCHES, _target(8, 16384), "float32"),
        QuantizeCase(QUANTIZER, _target(256, 1024), "float32"),
        QuantizeCase(QUANTIZER, _target(256, 1024), "bfloat16"),
        QuantizeCase(QUANTIZER, _target(8, 16384), "float32"),
        StepCase(QUANTIZER, _target(256, 1024)),
        StepCase(QUANTIZER, shape("llamagen")),
        StepCase(QUANTIZER, shape("vit-vqgan")),
    ]


def _all(name: str) -> list[CodebookShape]:
    from benchmarks.shapes import CODEBOOK_SHAPES

    return [row for row in CODEBOOK_SHAPES if row.name == name]


CASES: tuple[Case, ...] = (*_lookups(), *MODULATION_CASES, *ATTENTION_CASES, *NOISE_CASES)


def find_case(key: str) -> Case:
    return next(case for case in CASES if case.key == key)
