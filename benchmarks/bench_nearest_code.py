"""`nearest_code` on real models' shapes, against cdist + argmin, matmul + argmin and faiss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vqkernels

from .case import OURS, Check, Provider, Variant
from .checks import check_indices
from .peers import Problem, nearest_code_peers
from .shapes import CODEBOOK_SHAPES, CodebookShape, codebook_shape

PACKING_INCLUDED = "packing included"
PACKED_BEFORE = "packed before"
CALL_OVERHEAD = "call overhead"

DATA = ("gaussian", "clustered")

TINY = CodebookShape("tiny", 4, 8, 16, "l2", "cost of a call")


@dataclass(frozen=True)
class NearestCodeCase:
    row: CodebookShape
    mode: str
    default: bool = False
    quick: bool = False
    dtype: str = "float32"
    op: str = "nearest_code"

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def shape(self) -> str:
        return self.row.label

    @property
    def operations(self) -> float:
        return 2.0 * self.row.timed_tokens * self.row.dim * self.row.codebook_size

    @property
    def bytes_moved(self) -> float:
        """x and the book are read once, int64 indices are written once."""
        tokens = self.row.timed_tokens
        return 4.0 * self.row.dim * (tokens + self.row.codebook_size) + 8.0 * tokens

    def inputs(self, data: str) -> Problem:
        x, codebook = random_problem(self.row, self.row.timed_tokens, data)
        return Problem(x, codebook, self.row.metric, prepared=self.mode == PACKED_BEFORE)

    def providers(self) -> tuple[Provider, ...]:
        ours = Provider(OURS, (Variant("", bind_ours),))
        return ours, *nearest_code_peers(self.row.metric)

    def keep(self, output: Tensor) -> Tensor:
        return output

    def check(self, inputs: Problem, outputs: Mapping[str, Any]) -> dict[str, Check]:
        return check_indices(inputs.x, inputs.codebook, inputs.metric, outputs)

    def packed_bytes(self, inputs: Problem) -> int:
        packed = vqkernels.pack_codebook(inputs.codebook, metric=inputs.metric)
        return packed.numel() * packed.element_size()


def bind_ours(problem: Problem) -> Callable[[], Tensor]:
    x, codebook, metric = problem.x, problem.codebook, problem.metric
    if problem.prepared:
        packed = vqkernels.pack_codebook(codebook, metric=metric)
        return lambda: vqkernels.nearest_code(x, codebook, metric=metric, packed=packed)
    return lambda: vqkernels.nearest_code(x, codebook, metric=metric)


def random_problem(row: CodebookShape, tokens: int, data: str) -> tuple[Tensor, Tensor]:
    """Rows and a book of independent normals, or "clustered": rows scattered around the codes.

    Independent normals are the harder data, since distances concentrate and screens let more
    candidates through; a trained book is nearer to "clustered".
    """
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(row.codebook_size, row.dim, generator=generator)
    x = torch.randn(tokens, row.dim, generator=generator)
    if data == "clustered":
        centre = torch.randint(row.codebook_size, (tokens,), generator=generator)
        x = codebook[centre] + 0.3 * x
    return x, codebook


def _case(row: CodebookShape) -> NearestCodeCase:
    default = {
        codebook_shape("taming-f16", 1024),
        codebook_shape("taming-f16", 16384),
        codebook_shape("musicgen"),
        codebook_shape("vq-vae"),
        codebook_shape("vit-vqgan"),
        codebook_shape("llamagen"),
        codebook_shape("dac-44k"),
        codebook_shape("ldm-f4"),
        codebook_shape("emu3"),
        codebook_shape("ibq"),
    }
    quick = {codebook_shape("taming-f16", 1024), codebook_shape("musicgen")}
    if row.name == "streaming":
        return NearestCodeCase(row, PACKED_BEFORE, default=True, quick=row.tokens == 1)
    return NearestCodeCase(row, PACKING_INCLUDED, row in default, row in quick)


CASES: tuple[NearestCodeCase, ...] = (
    NearestCodeCase(TINY, CALL_OVERHEAD, default=True, quick=True),
    *map(_case, CODEBOOK_SHAPES),
)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.name} {c.shape}") for c in CASES if c.default]
)
def test_nearest_code(benchmark: Any, case: NearestCodeCase) -> None:
    problem = case.inputs("gaussian")
    call = bind_ours(problem)
    check = case.check(problem, {OURS: call()})[OURS]
    assert not check.refusal
    benchmark.extra_info["operations"] = case.operations
    benchmark(call)
