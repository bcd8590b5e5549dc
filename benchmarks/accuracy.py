"""Errors of the modulation and attention ops beside eager PyTorch: `python -m benchmarks.accuracy`.

Every result and gradient against the same formula in float64, on the same inputs: the largest
difference over the largest number. Eager PyTorch computes in the inputs' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels

from .bench_attention import our_attention
from .bench_modulation import OPS

TOKENS = (2, 256, 1152)
HEADS = (2, 8, 512, 72)
OUTLIER = 100.0  # added to one row of tokens, whose mean is then far above its deviation


@dataclass(frozen=True)
class Row:
    op: str
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    arguments: list[Tensor]
    results: tuple[str, ...]


def eager_rope(q: Tensor, k: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Both in q's dtype, as a model in that dtype computes them."""
    turned = []
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    for x in (q, k):
        a, b = F.rms_norm(x, x.shape[-1:], weight, 1e-6).chunk(2, -1)
        turned.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
    return turned


def rows() -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for op, versions in OPS.items():
        x = [draw(*TOKENS) for _ in range(versions.tokens)]
        x[0][0, 0] += OUTLIER if op != "bias_gelu" else 0
        rows_of = [TOKENS[-1]] if op == "bias_gelu" else [TOKENS[0], TOKENS[-1]]
        vectors = [draw(*rows_of) for _ in range(versions.vectors)]
        fused = op == "gated_residual_ada_layer_norm"
        names = ("normed", "new_residual") if fused else ("out",)
        yield Row(op, versions.ours, versions.eager, x + vectors, names)

    yield Row(
        "attention",
        our_attention,
        F.scaled_dot_product_attention,
        [draw(*HEADS) for _ in range(3)],
        ("out",),
    )
    cos, sin = vqkernels.rope_tables((16, 32), HEADS[-1])
    yield Row(
        "qk_norm_rope",
        lambda q, k, w: vqkernels.qk_norm_rope(q, k, q_weight=w, k_weight=w, cos=cos, sin=sin),
        lambda q, k, w: eager_rope(q, k, w, cos, sin),
        [draw(*HEADS), draw(*HEADS), draw(HEADS[-1])],
        ("q", "k"),
    )


def results(function: Callable[..., Any], arguments: list[Tensor]) -> list[Tensor]:
    """What `function` returns, and the gradients of its arguments."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    out = function(*leaves)
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    generator = torch.Generator().manual_seed(1)
    # In bf16, whatever the dtype of the results, so that all are given the same.
    grads = [torch.randn(t.shape, generator=generator).bfloat16().to(t.dtype) for t in out]
    return [t.detach() for t in (*out, *torch.autograd.grad(out, leaves, grads))]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def tables() -> Iterator[tuple[str, float, float]]:
    """`timestep_embedding` and `rope_tables`, and the usual formulas in fp32."""
    t, half = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 1000, 128

    def embed(t: Tensor) -> Tensor:
        steps = torch.arange(half, dtype=t.dtype) / half
        angles = t[:, None] * torch.exp(-math.log(10000) * steps)
        return torch.cat([angles.cos(), angles.sin()], -1)

    exact = embed(t.double())
    yield (
        "timestep_embedding",
        error(vqkernels.timestep_embedding(t, 2 * half), exact),
        error(embed(t), exact),
    )

    def table(dtype: torch.dtype) -> Tensor:
        frequencies = 10000.0 ** -(torch.arange(0, 128, 2, dtype=dtype) / 128)
        return (torch.arange(4096, dtype=dtype)[:, None] * frequencies).cos()

    exact = table(torch.float64)
    yield (
        "rope_tables",
        error(vqkernels.rope_tables((4096,), 128)[0], exact),
        error(table(torch.float32), exact),
    )


def main() -> None:
    """Prints a Markdown table."""
    print("| op | result | fp32 | eager | bf16 | eager |\n|---|---|---|---|---|---|")
    for row in rows():
        columns: list[list[float]] = []
        for dtype in (torch.float32, torch.bfloat16):
            arguments = [t.to(dtype) for t in row.arguments]
            exact = results(row.eager, [t.double() for t in arguments])
            for function in (row.ours, row.eager):
                found = results(function, arguments)
                columns.append([error(t, e) for t, e in zip(found, exact, strict=True)])
        given = len(row.results)
        for i, name in enumerate(row.results):
            print(_line(row.op, name, (column[i] for column in columns)))
        print(_line(row.op, "worst gradient", (max(column[given:]) for column in columns)))
    for op, *errors in tables():
        print(_line(op, "out", errors) + " | |")


def _line(op: str, result: str, errors: Iterable[float]) -> str:
    return f"| `{op}` | {result} | " + " | ".join(f"{e:.1e}" for e in errors) + " |"


if __name__ == "__main__":
    main()
