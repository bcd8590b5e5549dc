"""The modulation ops and `bias_gelu` at Diffusion Transformers' sizes, against PyTorch.

Forward, and forward with backward (gradients of every argument). Memory is most of what these ops
cost, so each row is run twice: with outputs that the allocator has kept from the call before, and
with fresh ones, every page of which the kernel of the operating system clears first.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .case import OURS, Check, Provider, Variant
from .checks import judged

EAGER, COMPILED = "eager", "torch.compile"
FORWARD, BOTH = "forward", "forward+backward"
REUSED, FRESH = "reused outputs", "fresh outputs"
EPS = 1e-6

Function = Callable[..., Any]


def eager_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def eager_gate(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return residual + gate[:, None] * x


def eager_fused(
    residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    stream = eager_gate(residual, x, gate)
    return eager_norm(stream, shift, scale), stream


def eager_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def our_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    from vqkernels import ada_layer_norm

    return ada_layer_norm(x, shift=shift, scale=scale, eps=EPS)


def our_gate(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    from vqkernels import gated_residual

    return gated_residual(residual, x, gate=gate)


def our_fused(
    residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    from vqkernels import gated_residual_ada_layer_norm

    return gated_residual_ada_layer_norm(residual, x, gate=gate, shift=shift, scale=scale, eps=EPS)


def our_gelu(x: Tensor, bias: Tensor) -> Tensor:
    from vqkernels import bias_gelu

    return bias_gelu(x, bias)


@dataclass(frozen=True)
class Op:
    """Both functions, how many tensors of tokens and vectors they take, and how many they return;
    `operations` an element has to cost, forward and backward."""

    ours: Function
    eager: Function
    tokens: int
    vectors: int
    results: int
    operations: tuple[int, int]


OPS = {
    "ada_layer_norm": Op(our_norm, eager_norm, 1, 2, 1, (9, 14)),
    "gated_residual": Op(our_gate, eager_gate, 2, 1, 1, (2, 3)),
    "gated_residual_ada_layer_norm": Op(our_fused, eager_fused, 2, 3, 2, (11, 18)),
    "bias_gelu": Op(our_gelu, eager_gelu, 1, 1, 1, (24, 30)),
}


@dataclass(frozen=True)
class Inputs:
    arguments: list[Tensor]
    grads: list[Tensor]


@dataclass(frozen=True)
class ModulationCase:
    op: str
    name: str
    batch: int
    tokens: int
    dim: int
    dtype: str
    direction: str = FORWARD
    memory: str = REUSED
    default: bool = True
    quick: bool = False

    @property
    def shape(self) -> str:
        return f"B{self.batch} N{self.tokens} D{self.dim} {self.dtype}"

    @property
    def mode(self) -> str:
        return f"{self.direction}, {self.memory}"

    @property
    def elements(self) -> int:
        return self.batch * self.tokens * self.dim

    @property
    def operations(self) -> float:
        forward, backward = OPS[self.op].operations
        return float(self.elements * (forward + (backward if self.direction == BOTH else 0)))

    @property
    def bytes_moved(self) -> float:
        """Tokens are read and results written; backward reads what normalization or gate needs
        and the results' gradients, and writes the arguments' gradients."""
        op = OPS[self.op]
        tensors = op.tokens + op.results
        if self.direction == BOTH:
            branch_alone = self.op == "gated_residual"
            tensors += op.results + (1 if branch_alone else 2 * op.tokens)
            tensors += 1 if branch_alone else 0
        return float(tensors * self.elements * getattr(torch, self.dtype).itemsize)

    def inputs(self, data: str) -> Inputs:
        keep_freed_memory(self.memory == REUSED)
        op, dtype = OPS[self.op], getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        size = (self.batch, self.tokens, self.dim)
        tokens = [draw(*size) for _ in range(op.tokens)]
        vectors = list(draw(self.batch, 6 * self.dim).chunk(6, dim=1)[: op.vectors])
        if self.op == "bias_gelu":
            vectors = [draw(self.dim)]
        return Inputs(tokens + vectors, [draw(*size) for _ in range(op.results)])

    def functions(self) -> tuple[Function, Function]:
        """Ours and eager's."""
        return OPS[self.op].ours, OPS[self.op].eager

    def providers(self) -> tuple[Provider, ...]:
        ours, eager = self.functions()

        def compiled(mode: str) -> Callable[[Inputs], Callable[[], Any]]:
            return lambda inputs: self.bind(torch.compile(eager, mode=mode), inputs)

        return (
            Provider(OURS, (Variant("", lambda inputs: self.bind(ours, inputs)),)),
            Provider(EAGER, (Variant("", lambda inputs: self.bind(eager, inputs)),)),
            Provider(
                COMPILED,
                tuple(
                    Variant(mode, compiled(mode))
                    for mode in ("default", "max-autotune-no-cudagraphs")
                ),
            ),
        )

    def bind(self, function: Function, inputs: Inputs) -> Callable[[], list[Tensor]]:
        backward = self.direction == BOTH
        leaves = [t.detach().requires_grad_(backward) for t in inputs.arguments]

        def call() -> list[Tensor]:
            results = function(*leaves)
            results = list(results) if isinstance(results, tuple) else [results]
            if not backward:
                return results
            return [*results, *torch.autograd.grad(results, leaves, inputs.grads)]

        call()  # compiles
        return call

    def keep(self, output: list[Tensor]) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in output]

    def check(self, inputs: Inputs, outputs: Mapping[str, Any]) -> dict[str, Check]:
        """At most twice eager's error and an ulp of the largest number; 2e-6 of it in fp32."""
        wide = Inputs([t.double() for t in inputs.arguments], [g.double() for g in inputs.grads])
        exact = self.keep(self.bind(self.functions()[1], wide)())
        return judged(exact, outputs, EAGER, 2e-6, self.batch * self.tokens)

    def packed_bytes(self, inputs: Inputs) -> None:
        return None


def keep_freed_memory(keep: bool) -> None:
    """Whether the C library keeps what is freed for the next allocation, or gives it back."""
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_threshold, mmap_max, fast_pieces = -1, -3, -4, 1
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(fast_pieces, 0)  # small pieces join what is free beside them at once
    mallopt(mmap_max, 0 if keep else 1 << 16)
    mallopt(trim_threshold, (1 << 31) - 1 if keep else 1 << 17)
    mallopt(mmap_threshold, 1 << 17)


def _cases() -> tuple[ModulationCase, ...]:
    found = []
    models = (
        ("DiT-S/2", 8, 256, 384),
        ("DiT-B/2", 4, 256, 768),
        ("DiT-L/2", 4, 256, 1024),
        ("DiT-XL/2", 2, 1024, 1152),
    )
    for op in OPS:
        for name, batch, tokens, dim in models:
            width = 4 * dim if op == "bias_gelu" else dim
            for dtype in ("bfloat16", "float32"):
                for direction in (FORWARD, BOTH):
                    for memory in (REUSED, FRESH):
                        ends = name in ("DiT-S/2", "DiT-XL/2")
                        first = (name, dtype, direction) == ("DiT-S/2", "bfloat16", FORWARD)
                        found.append(
                            ModulationCase(
                                op,
                                name,
                                batch,
                                tokens,
                                width,
                                dtype,
                                direction,
                                memory,
                                default=ends and memory == REUSED,
                                quick=first and memory == REUSED,
                            )
                        )
    return tuple(found)


CASES = _cases()


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.op} {c.name} {c.shape} {c.mode}") for c in CASES if c.default]
)
def test_modulation(benchmark: Any, case: ModulationCase) -> None:
    inputs = case.inputs("gaussian")
    call = case.providers()[0].variants[0].bind(inputs)
    eager = case.providers()[1].variants[0].bind(inputs)
    outputs = {OURS: case.keep(call()), EAGER: case.keep(eager())}
    assert not case.check(inputs, outputs)[OURS].refusal
    benchmark.extra_info["operations"] = case.operations
    benchmark(call)
