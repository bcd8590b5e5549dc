"""What stands on attention's Triton kernels, on a GPU and small: dropout, sequences of varying
length, a packed projection, and the two branches of a block."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from _helpers.data import generator
from _helpers.modulation import eager_gate, eager_norm
from _helpers.precision import forward_and_backward, judge
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vqkernels import (
    attention,
    attention_qkvpacked,
    attention_varlen,
    modulated_attention,
    modulated_mlp,
)
from vqkernels.reference.attention import dropout_factors

HALVES = [torch.bfloat16, torch.float16]
LENGTHS = ((70, 70), (1, 33), (0, 5), (9, 0), (130, 65))  # queries and keys of each sequence
SEED = 0x1E3779B97F4A7C15
halves = pytest.mark.parametrize("dtype", HALVES)


class Draw:
    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._to, self._generator = (device, dtype), generator(11)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(*self._to)


@halves
@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout(triton_backend, device, is_causal, dtype):
    """The weights that the reference drops."""
    draw = Draw(device, dtype)
    for dim in (64, 72):
        q, k, v = draw(2, 3, 100, dim), draw(2, 3, 90, dim), draw(2, 3, 90, 64)
        grad = draw(2, 3, 100, 64)
        seed = torch.tensor(SEED, device=device)

        def formula(q: Tensor, k: Tensor, v: Tensor, seed: Tensor = seed) -> Tensor:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if is_causal:
                seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=device).tril()
                scores = scores.masked_fill(~seen, -torch.inf)
            weights = scores.softmax(-1)
            return (weights * dropout_factors(weights, 0.25, seed)) @ v

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, is_causal=is_causal, dropout_p=0.25, seed=SEED)

        judge(ours, formula, (q, k, v), [grad])


@halves
@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.25, "seed": SEED}])
def test_sequences_of_varying_length(triton_backend, device, dropout, dtype):
    """Each as by itself; dropped weights go by the sequence's number, so those run twice only."""
    draw = Draw(device, dtype)
    counts = [[*of] for of in zip(*LENGTHS, strict=True)]
    starts = [
        torch.tensor([0, *itertools.accumulate(of)], dtype=torch.int32, device=device)
        for of in counts
    ]
    named = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
    named |= {"max_seqlen_q": max(counts[0]), "max_seqlen_k": max(counts[1])}
    queries, keys = map(sum, counts)
    inputs = draw(queries, 2, 64), draw(keys, 2, 64), draw(keys, 2, 64)
    grad = draw(queries, 2, 64)

    def ours(*t: Tensor) -> Tensor:
        return attention_varlen(*t, **named, **dropout)

    def one_by_one(*t: Tensor) -> Tensor:
        of = (counts[0], counts[1], counts[1])
        samples = zip(*(rows.split(n) for rows, n in zip(t, of, strict=True)), strict=True)
        return torch.cat([_alone(*(part.transpose(0, 1)[None] for part in s)) for s in samples])

    if dropout:
        first, again = (forward_and_backward(ours, inputs, [grad]) for _ in range(2))
        assert all(t.isfinite().all() for t in first)
        assert all(map(torch.equal, first, again))
    else:
        judge(ours, one_by_one, inputs, [grad])


def _alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if k.shape[2] == 0:
        return (q * 0)[0].transpose(0, 1)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


@halves
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("name", ["plain", "causal", "added", "dropout"])
def test_a_packed_projection_gives_the_bits_of_its_views(triton_backend, device, name, dim, dtype):
    draw = Draw(device, dtype)
    qkv, grad = draw(2, 70, 3, 3, dim), draw(2, 70, 3, dim)
    arguments: dict[str, Any] = {
        "plain": {},
        "causal": {"is_causal": True},
        "added": {"attn_mask": draw(2, 1, 70, 70)},
        "dropout": {"dropout_p": 0.25, "seed": SEED},
    }[name]

    def by_heads(qkv: Tensor) -> Tensor:
        return attention(*qkv.permute(2, 0, 3, 1, 4), **arguments).transpose(1, 2)

    def packed(qkv: Tensor) -> Tensor:
        return attention_qkvpacked(qkv, **arguments)

    found = forward_and_backward(packed, [qkv], [grad])
    assert all(map(torch.equal, found, forward_and_backward(by_heads, [qkv], [grad])))


@halves
@pytest.mark.parametrize("dim", [216, 256])
def test_branches_of_a_block(triton_backend, device, dim, dtype):
    draw = Draw(device, dtype)
    x, grad = draw(2, 70, dim), draw(2, 70, dim)
    vectors = draw(2, 6 * dim).chunk(6, dim=1)[:3]  # shift, scale, gate
    heads = 3 if dim == 216 else 4

    def branch(call: Any, first: str, last: str, **more: Any) -> Any:
        names = ["shift", "scale", "gate"]
        names += [f"{of}_{kind}" for of in (first, last) for kind in ("weight", "bias")]

        def function(x: Tensor, *given: Tensor) -> Tensor:
            return call(x, **dict(zip(names, given, strict=True)), **more)

        return function

    def attended(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *of: Tensor) -> Tensor:
        qkv = F.linear(eager_norm("layer")(x, shift, scale), of[0], of[1])
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v)
        return eager_gate(x, F.linear(out.transpose(1, 2).flatten(2), of[2], of[3]), gate)

    def activated(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *of: Tensor) -> Tensor:
        wide = F.linear(eager_norm("layer")(x, shift, scale), of[0], of[1])
        out = F.linear(F.gelu(wide, approximate="tanh"), of[2], of[3])
        return eager_gate(x, out, gate)

    def layers(width: int, columns: int) -> list[Tensor]:
        sizes = ((width, dim), (width,), (dim, columns), (dim,))
        return [draw(*size) / (size[-1] ** 0.5 if len(size) > 1 else 1) for size in sizes]

    ours = branch(modulated_attention, "qkv", "proj", num_heads=heads)
    judge(ours, attended, (x, *vectors, *layers(3 * dim, dim)), [grad])
    ours = branch(modulated_mlp, "fc1", "fc2")
    judge(ours, activated, (x, *vectors, *layers(4 * dim, 4 * dim)), [grad])
