"""`attention` at Diffusion Transformers' sizes, against PyTorch's `scaled_dot_product_attention`.

q, k and v are views of one packed projection, as in a model. Forward, and forward with backward
(gradients of all three). The peer runs as called plainly, and from copies in which heads come
first; the faster one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .bench_modulation import BOTH, FORWARD, keep_freed_memory
from .case import OURS, Check, Provider, Variant
from .checks import judged

SDPA = "SDPA"


def our_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from vqkernels import attention

    return attention(q, k, v)


@dataclass(frozen=True)
class Inputs:
    heads: list[Tensor]
    grad: Tensor


@dataclass(frozen=True)
class AttentionCase:
    name: str
    batch: int
    heads: int
    tokens: int
    dim: int
    dtype: str
    direction: str = FORWARD
    default: bool = True
    quick: bool = False
    op: str = "attention"

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.heads} N{self.tokens} d{self.dim} {self.dtype}"

    @property
    def mode(self) -> str:
        return self.direction

    @property
    def operations(self) -> float:
        """Two products forward and five backward."""
        product = 2.0 * self.batch * self.heads * self.tokens**2 * self.dim
        return product * (7 if self.direction == BOTH else 2)

    @property
    def bytes_moved(self) -> float:
        """q, k, v and out; backward reads these and a gradient, and writes three."""
        numbers = self.batch * self.heads * self.tokens * self.dim
        tensors = 4 + (8 if self.direction == BOTH else 0)
        return float(tensors * numbers * getattr(torch, self.dtype).itemsize)

    def inputs(self, data: str) -> Inputs:
        keep_freed_memory(True)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(getattr(torch, self.dtype))

        packed = draw(self.batch, self.tokens, 3, self.heads, self.dim)
        grad = draw(self.batch, self.tokens, self.heads, self.dim).transpose(1, 2)
        return Inputs(list(packed.permute(2, 0, 3, 1, 4)), grad)

    def providers(self) -> tuple[Provider, ...]:
        def contiguous(inputs: Inputs) -> Callable[[], Any]:
            heads = [t.contiguous() for t in inputs.heads]
            return self.bind(F.scaled_dot_product_attention, Inputs(heads, inputs.grad))

        return (
            Provider(OURS, (Variant("", lambda inputs: self.bind(our_attention, inputs)),)),
            Provider(
                SDPA,
                (
                    Variant("", lambda inputs: self.bind(F.scaled_dot_product_attention, inputs)),
                    Variant("heads first", contiguous),
                ),
            ),
        )

    def bind(self, function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], list[Tensor]]:
        backward = self.direction == BOTH
        leaves = [t.detach().requires_grad_(backward) for t in inputs.heads]

        def call() -> list[Tensor]:
            out = function(*leaves)
            return [out, *torch.autograd.grad(out, leaves, inputs.grad)] if backward else [out]

        return call

    def keep(self, output: list[Tensor]) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in output]

    def check(self, inputs: Inputs, outputs: Mapping[str, Any]) -> dict[str, Check]:
        """At most twice SDPA's error and an ulp of the largest number; 4e-6 of it in fp32."""
        wide = Inputs([t.double() for t in inputs.heads], inputs.grad.double())
        exact = self.keep(self.bind(F.scaled_dot_product_attention, wide)())
        return judged(exact, outputs, SDPA, 4e-6, self.batch * self.heads * self.tokens)

    def packed_bytes(self, inputs: Inputs) -> None:
        return None


def _cases() -> tuple[AttentionCase, ...]:
    models = (
        ("DiT-S/2", 4, 6, 256, 64),
        ("DiT-S/8", 32, 6, 16, 64),
        ("DiT-B/2", 2, 12, 256, 64),
        ("DiT-XL/2", 1, 16, 256, 72),
        ("DiT-XL/2 512 px", 1, 16, 1024, 72),
        ("PixArt-Sigma", 1, 16, 4096, 72),
        ("FLUX.1 of 4 heads", 1, 4, 4096, 128),
    )
    return tuple(
        AttentionCase(
            name,
            batch,
            heads,
            tokens,
            dim,
            dtype,
            direction,
            default=tokens <= 1024,
            quick=(name, dtype, direction) == ("DiT-S/2", "bfloat16", FORWARD),
        )
        for name, batch, heads, tokens, dim in models
        for dtype in ("bfloat16", "float32")
        for direction in (FORWARD, BOTH)
    )


CASES = _cases()


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.name} {c.shape} {c.mode}") for c in CASES if c.default]
)
def test_attention(benchmark: Any, case: AttentionCase) -> None:
    inputs = case.inputs("gaussian")
    ours, peer = (provider.variants[0].bind(inputs) for provider in case.providers())
    outputs = {OURS: case.keep(ours()), SDPA: case.keep(peer())}
    assert not case.check(inputs, outputs)[OURS].refusal
    benchmark.extra_info["operations"] = case.operations
    benchmark(ours)
