"""`qk_norm_rope` on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from _helpers.precision import forward_and_backward, judge
from _helpers.turning import draw_heads, eager_turned
from torch import Tensor

from vqkernels import qk_norm_rope, rope_tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["rms", "layer", "none"]
Tables = tuple[Tensor, Tensor] | None


def ours(norm: str, interleaved: bool, tables: Tables):
    cos, sin = tables or (None, None)

    def function(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        q_weight, k_weight = weights or (None, None)
        return qk_norm_rope(
            q,
            k,
            q_weight=q_weight,
            k_weight=k_weight,
            cos=cos,
            sin=sin,
            norm=norm,
            interleaved=interleaved,
        )

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_forward_and_backward(triton_backend, device, norm, interleaved, dtype):
    for heads, key_heads, tokens, dim in (
        (6, 6, 256, 64),
        (16, 4, 100, 72),
        (2, 1, 37, 128),
        (3, 3, 9, 30),
        (2, 2, 5, 256),
    ):
        inputs, grads = draw_heads(heads, key_heads, tokens, dim, dtype)
        inputs, grads = ([t.to(device) for t in of] for of in (inputs, grads))
        tables = rope_tables((tokens,), dim, device=device)
        by_sample = tuple(torch.stack([table, table.flip(0)]) for table in tables)
        for chosen in (None, tables, by_sample):
            judge(
                ours(norm, interleaved, chosen),
                eager_turned(norm, interleaved, chosen),
                inputs,
                grads,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 72])
def test_packed_views_and_the_same_bits(triton_backend, device, dim, dtype):
    packed = torch.randn(2, 200, 3, 8, dim).to(device, dtype)
    q, k, _ = packed.permute(2, 0, 3, 1, 4)
    tables = rope_tables((10, 20), dim, device=device)
    row = torch.randn(dim).to(device, dtype)
    grads = [torch.randn(2, 8, 200, dim).to(device, dtype) for _ in "qk"]
    for interleaved in (False, True):
        function = ours("rms", interleaved, tables)
        found = forward_and_backward(function, (q, k, row, row), grads)
        for pair in ((q, k), (q.contiguous(), k.contiguous())):
            again = forward_and_backward(function, (*pair, row, row), grads)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_opcheck(triton_backend, device):
    inputs, _ = draw_heads(2, 1, 5, 12, torch.float32)
    q, k, *weights = (t.to(device).requires_grad_() for t in inputs)
    cos, sin = rope_tables((5,), 12, device=device)
    arguments = (q, k, *weights, cos, sin, 1e-6, "layer", True, triton_backend)
    torch.library.opcheck(torch.ops.vqkernels.qk_norm_rope.default, arguments)


def test_the_automatic_choice(device):
    inputs, grads = draw_heads(2, 2, 7, 24, torch.float32)
    inputs, grads = ([t.to(device) for t in of] for of in (inputs, grads))
    tables = rope_tables((7,), 24, device=device)
    judge(ours("rms", True, tables), eager_turned("rms", True, tables), inputs, grads)
