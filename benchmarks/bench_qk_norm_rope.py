"""`qk_norm_rope` at Diffusion Transformers' sizes, against PyTorch.

q and k are views of one packed projection, as in a model. Forward, and forward with backward
(gradients of q, k and both weights). PyTorch's side is `F.rms_norm` and the rotation in the dtype
of q, eager and compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .bench_modulation import (
    BOTH,
    EAGER,
    EPS,
    FORWARD,
    Function,
    Inputs,
    ModulationCase,
    keep_freed_memory,
)
from .case import OURS

# Operations an element has to cost, forward and backward.
OPERATIONS = (7, 16)


def eager_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def eager_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


@dataclass(frozen=True)
class QkNormRopeCase(ModulationCase):
    """`dim` is that of a head."""

    heads: int = 1
    interleaved: bool = False

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.heads} N{self.tokens} d{self.dim} {self.dtype}"

    @property
    def mode(self) -> str:
        return self.direction

    @property
    def elements(self) -> int:
        return 2 * self.batch * self.heads * self.tokens * self.dim

    @property
    def operations(self) -> float:
        forward, backward = OPERATIONS
        return float(self.elements * (forward + (backward if self.direction == BOTH else 0)))

    @property
    def bytes_moved(self) -> float:
        """q and k are read and written; backward reads them and their gradients and writes two."""
        tensors = 5 if self.direction == BOTH else 2
        return float(tensors * self.elements * getattr(torch, self.dtype).itemsize)

    def inputs(self, data: str) -> Inputs:
        keep_freed_memory(True)
        dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        packed = draw(self.batch, self.tokens, 3, self.heads, self.dim)
        q, k, _ = packed.permute(2, 0, 3, 1, 4)
        grads = [draw(self.batch, self.heads, self.tokens, self.dim) for _ in "qk"]
        return Inputs([q, k, draw(self.dim), draw(self.dim)], grads)

    def functions(self) -> tuple[Function, Function]:
        from vqkernels import qk_norm_rope, rope_tables

        cos, sin = rope_tables((self.tokens,), self.dim)
        tables = {
            dtype: (cos.to(dtype), sin.to(dtype))
            for dtype in (torch.float32, torch.bfloat16, torch.float64)
        }
        turn = eager_pairs if self.interleaved else eager_halves

        def ours(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Any:
            return qk_norm_rope(
                q,
                k,
                q_weight=q_weight,
                k_weight=k_weight,
                cos=cos,
                sin=sin,
                eps=EPS,
                interleaved=self.interleaved,
            )

        def eager(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Any:
            width = q.shape[-1:]
            return (
                turn(F.rms_norm(q, width, q_weight, EPS), *tables[q.dtype]),
                turn(F.rms_norm(k, width, k_weight, EPS), *tables[k.dtype]),
            )

        return ours, eager


def _cases() -> tuple[QkNormRopeCase, ...]:
    models = (
        ("DiT-S/2", 8, 6, 256, 64, False),
        ("DiT-XL/2", 2, 16, 1024, 72, False),
        ("SD3-medium", 1, 24, 1024, 64, False),
        ("FLUX.1", 1, 24, 1024, 128, True),
    )
    return tuple(
        QkNormRopeCase(
            "qk_norm_rope",
            name,
            batch,
            tokens,
            dim,
            dtype,
            direction,
            default=name != "SD3-medium",
            quick=(name, dtype, direction) == ("DiT-S/2", "bfloat16", FORWARD),
            heads=heads,
            interleaved=interleaved,
        )
        for name, batch, heads, tokens, dim, interleaved in models
        for dtype in ("bfloat16", "float32")
        for direction in (FORWARD, BOTH)
    )


CASES = _cases()


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.name} {c.shape} {c.mode}") for c in CASES if c.default]
)
def test_qk_norm_rope(benchmark: Any, case: QkNormRopeCase) -> None:
    inputs = case.inputs("gaussian")
    ours, eager = (provider.variants[0].bind(inputs) for provider in case.providers()[:2])
    outputs = {OURS: case.keep(ours()), EAGER: case.keep(eager())}
    assert not case.check(inputs, outputs)[OURS].refusal
    benchmark.extra_info["operations"] = case.operations
    benchmark(ours)
