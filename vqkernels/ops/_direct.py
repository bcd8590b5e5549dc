"""Short calls in eager mode: an op's kernel is called itself, past PyTorch's dispatcher.

The dispatcher and `torch.library`'s gradients cost 10 to 100 us a call, more for each argument,
which is more than a small sampling step or loss takes. Traced calls (torch.compile, fake tensors,
any dispatch mode) go through the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vqkernels.ops._library import Kernels

Gradient = type[torch.autograd.Function]


def traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def run(
    op: Callable[..., Any],
    kernels: Kernels,
    arguments: tuple[Any, ...],
    backend: str,
    *rest: Any,
    gradient: Gradient | None = None,
) -> Any:
    """`op(*arguments, backend)`; `rest` are further arguments that its kernels take, and `gradient`
    is what `gradient_of` made for a differentiable op."""
    if traced():
        return op(*arguments, backend)
    if torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in arguments
    ):
        if gradient is None:
            return op(*arguments, backend)
        return gradient.apply(*arguments, backend)
    return kernels(backend)(*arguments, *rest)


def write(kernels: Kernels, arguments: tuple[Any, ...], backend: str, out: Sequence[Tensor]) -> Any:
    """Run a kernel that writes `out`, or new tensors if that is empty, without a gradient.

    Autograd sees what was written: a graph that saved one of these tensors raises in its backward.
    """
    with torch.no_grad():
        results = kernels(backend)(*arguments, list(out))
    for tensor in out:
        torch.autograd.graph.increment_version(tensor)
    return results


def gradient_of(
    name: str,
    kernels: Kernels,
    backward: Callable[..., Any],
    save: Callable[..., None],
    *rest: Any,
) -> Gradient:
    """The op's gradient formula for `run`; `rest` are further arguments that its kernels take."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        results = kernels(arguments[-1])(*arguments[:-1], *rest)
        save(ctx, arguments, results)
        return results

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)
