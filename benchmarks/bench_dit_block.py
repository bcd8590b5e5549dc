"""A block of each Diffusion Transformer, against the same block in plain PyTorch.

Forward, and forward with backward (gradients of tokens, condition and parameters). Parameters are
shared and random: zero-initialized gates would leave a block with nothing to get wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bench_modulation import BOTH, COMPILED, EAGER, EPS, FORWARD, keep_freed_memory
from .case import OURS, Check, Provider, Variant
from .checks import judged

Function = Callable[[Tensor, Tensor], Tensor]


def eager_block(block: Any, x: Tensor, c: Tensor) -> Tensor:
    """As facebookresearch/DiT's blocks compute, on the parameters of one of ours."""
    batch, tokens, dim = x.shape
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c).chunk(6, dim=1)

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (dim,), eps=EPS) * (1 + scale[:, None]) + shift[:, None]

    heads = block.attn.num_heads
    qkv = block.attn.qkv(modulated(x, shift, scale)).reshape(batch, tokens, 3, heads, dim // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
    x = x + gate[:, None] * block.attn.proj(attended)
    hidden = F.gelu(block.mlp.fc1(modulated(x, shift_mlp, scale_mlp)), approximate="tanh")
    return x + gate_mlp[:, None] * block.mlp.fc2(hidden)


@dataclass(frozen=True)
class Inputs:
    block: nn.Module
    tokens: Tensor
    condition: Tensor
    grad: Tensor


@dataclass(frozen=True)
class BlockCase:
    name: str
    batch: int
    tokens: int
    dim: int
    heads: int
    dtype: str
    direction: str = FORWARD
    default: bool = True
    quick: bool = False
    op: str = "DiTBlock"

    @property
    def shape(self) -> str:
        return f"B{self.batch} N{self.tokens} D{self.dim} H{self.heads} {self.dtype}"

    @property
    def mode(self) -> str:
        return self.direction

    @property
    def operations(self) -> float:
        """Four products with weights (12 D^2 a token), the condition's, and two of attention;
        twice each of them backward, and attention's scores anew."""
        rows = self.batch * self.tokens
        weights = 2.0 * 12 * self.dim**2 * rows + 2.0 * 6 * self.dim**2 * self.batch
        attention = 4.0 * rows * self.tokens * self.dim
        if self.direction == BOTH:
            return 3 * weights + 3.5 * attention
        return weights + attention

    @property
    def bytes_moved(self) -> float:
        """Tokens in and out and the parameters, each read once; backward reads them again and
        writes their gradients."""
        numbers = 2 * self.batch * self.tokens * self.dim + 18 * self.dim**2
        passes = 3 if self.direction == BOTH else 1
        return float(passes * numbers * getattr(torch, self.dtype).itemsize)

    def inputs(self, data: str) -> Inputs:
        from vqkernels.nn import DiTBlock

        keep_freed_memory(True)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(getattr(torch, self.dtype))

        block = DiTBlock(self.dim, self.heads).to(getattr(torch, self.dtype))
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.copy_(0.5 * self.dim**-0.5 * draw(*parameter.shape))
        size = (self.batch, self.tokens, self.dim)
        return Inputs(block, draw(*size), draw(self.batch, self.dim), draw(*size))

    def providers(self) -> tuple[Provider, ...]:
        def ours(inputs: Inputs) -> Callable[[], Any]:
            return self.bind(inputs.block, inputs)

        def eager(inputs: Inputs) -> Callable[[], Any]:
            return self.bind(lambda x, c: eager_block(inputs.block, x, c), inputs)

        def compiled(mode: str) -> Callable[[Inputs], Callable[[], Any]]:
            def start(inputs: Inputs) -> Callable[[], Any]:
                function = torch.compile(
                    lambda x, c: eager_block(inputs.block, x, c), mode=mode, dynamic=False
                )
                return self.bind(function, inputs)

            return start

        modes = ("default", "max-autotune-no-cudagraphs")
        return (
            Provider(OURS, (Variant("", ours),)),
            Provider(EAGER, (Variant("", eager),)),
            Provider(COMPILED, tuple(Variant(mode, compiled(mode)) for mode in modes)),
        )

    def bind(self, function: Function, inputs: Inputs) -> Callable[[], list[Tensor]]:
        backward = self.direction == BOTH
        x, c = (t.detach().requires_grad_(backward) for t in (inputs.tokens, inputs.condition))
        leaves = [x, c, *inputs.block.parameters()]

        def call() -> list[Tensor]:
            if not backward:
                with torch.no_grad():
                    return [function(x, c)]
            out = function(x, c)
            return [out, *torch.autograd.grad(out, leaves, inputs.grad)]

        call()  # compiles
        return call

    def keep(self, output: list[Tensor]) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in output]

    def check(self, inputs: Inputs, outputs: Mapping[str, Any]) -> dict[str, Check]:
        """At most twice eager's error and an ulp of the largest number; 1e-5 of it in fp32."""
        block = copy.deepcopy(inputs.block).double()
        wide = Inputs(
            block, inputs.tokens.double(), inputs.condition.double(), inputs.grad.double()
        )
        exact = self.keep(self.bind(lambda x, c: eager_block(block, x, c), wide)())
        return judged(exact, outputs, EAGER, 1e-5, self.batch * self.tokens)

    def packed_bytes(self, inputs: Inputs) -> None:
        return None


def _cases() -> tuple[BlockCase, ...]:
    models = (
        ("DiT-S/8", 32, 16, 384, 6),
        ("DiT-S/2", 8, 256, 384, 6),
        ("DiT-B/2", 4, 256, 768, 12),
        ("DiT-L/2", 2, 256, 1024, 16),
        ("DiT-XL/2", 2, 256, 1152, 16),
        ("DiT-XL/2 512 px", 1, 1024, 1152, 16),
    )
    return tuple(
        BlockCase(
            *model,
            dtype,
            direction,
            default=model[0] in ("DiT-S/2", "DiT-XL/2"),
            quick=(model[0], dtype, direction) == ("DiT-S/2", "bfloat16", FORWARD),
        )
        for model in models
        for dtype in ("bfloat16", "float32")
        for direction in (FORWARD, BOTH)
    )


CASES = _cases()


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.name} {c.shape} {c.mode}") for c in CASES if c.default]
)
def test_dit_block(benchmark: Any, case: BlockCase) -> None:
    inputs = case.inputs("gaussian")
    ours, eager = (provider.variants[0].bind(inputs) for provider in case.providers()[:2])
    outputs = {OURS: case.keep(ours()), EAGER: case.keep(eager())}
    assert not case.check(inputs, outputs)[OURS].refusal
    benchmark.extra_info["operations"] = case.operations
    benchmark(ours)
