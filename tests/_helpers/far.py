"""Tensors whose last rows lie more than 2^31 elements behind the first, in memory that is never
touched between them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vqkernels

_LINE = 64  # elements, so that rows are aligned as others are


def far_apart(tensor: Tensor) -> Tensor:
    """The same numbers; rows of the last dimension are equally far apart."""
    lead, width = tensor.shape[:-1], tensor.shape[-1]
    rows = lead.numel()
    apart = ((1 << 31) // (rows - 1) // _LINE + 1) * _LINE
    elements = (rows - 1) * apart + width
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, elements * tensor.element_size(), flags=flags)
    except (OSError, ValueError) as error:
        pytest.skip(f"no address space for {elements} elements: {error}")
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    strides = torch.empty(lead, device="meta").stride()
    far = flat.as_strided(tensor.shape, (*(apart * stride for stride in strides), 1))
    far.copy_(tensor)
    assert (rows - 1) * apart >= 1 << 31
    return far


ROWS = (2, 5, 40)
HEADS = (1, 2, 9, 24)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


def modulated(call: Callable[..., Any], vectors: int) -> tuple[Callable[..., Any], list[Tensor]]:
    names = ("gate", "shift", "scale") if vectors == 3 else ("gate",)
    names = ("shift", "scale") if vectors == 2 else names
    tokens = [draw(*ROWS)] if vectors == 2 else [draw(*ROWS), draw(*ROWS)]

    def function(*given: Tensor) -> Any:
        named = dict(zip(names, given[len(tokens) :], strict=True))
        return call(*given[: len(tokens)], **named)

    # A vector a token, so that vectors are far apart too.
    return function, [*tokens, *(draw(*ROWS) for _ in names)]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return vqkernels.attention(q, k, v, attn_mask=mask)


def tokens_of(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = vqkernels.rope_tables((3, 3), 24)
    return vqkernels.qk_norm_rope(q, k, cos=cos, sin=sin)


CASES: dict[str, Callable[[], tuple[Callable[..., Any], list[Tensor]]]] = {
    "ada_layer_norm": lambda: modulated(vqkernels.ada_layer_norm, 2),
    "gated_residual": lambda: modulated(vqkernels.gated_residual, 1),
    "gated_residual_ada_layer_norm": lambda: modulated(vqkernels.gated_residual_ada_layer_norm, 3),
    "bias_gelu": lambda: (vqkernels.bias_gelu, [draw(*ROWS)]),
    "qk_norm_rope": lambda: (tokens_of, [draw(*HEADS), draw(*HEADS)]),
    "attention": lambda: (vqkernels.attention, [draw(*HEADS) for _ in range(3)]),
    "attention, mask": lambda: (
        masked_attention,
        [*(draw(*HEADS) for _ in range(3)), draw(1, 2, 9, 9)],
    ),
}


def results(function: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor] | None) -> Any:
    """What the function returns, with gradients of the tensors that have one, `grads` given."""
    leaves = [t.detach().requires_grad_(grads is not None) for t in inputs]
    if function is masked_attention and grads is not None:
        leaves[3].requires_grad_(False)
    found = function(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    if grads is None:
        return outputs
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return torch.autograd.grad(outputs, wanted, grads[: len(outputs)])


def judge_far_apart(name: str, dtype: torch.dtype) -> None:
    """Results and gradients are the same bits, far apart or close together."""
    function, inputs = CASES[name]()
    near = [t.to(dtype) for t in inputs]
    far = [far_apart(t) for t in near]
    with torch.no_grad():
        expected = results(function, near, None)
        for mine, true in zip(results(function, far, None), expected, strict=True):
            assert torch.equal(mine, true)
    grads = [torch.randn_like(t) for t in expected]
    given = [far_apart(g) for g in grads]
    close = results(function, near, grads)
    for mine, true in zip(results(function, far, given), close, strict=True):
        assert torch.equal(mine, true)
