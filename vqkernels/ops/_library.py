"""Defining an op: its schema, the kernels behind it, its fake kernel and its gradient.

Every op lives in the namespace `vqkernels` and takes `str backend` as its last argument, already
resolved by `backends.select`; one lookup by that name finds the kernel, on every device:

    reference   vqkernels.reference.<file>
    cpu         torch.ops.vqkernels_cpu.<name>, from the native object (csrc/ops)
    triton      vqkernels.triton.<name>
    cuda        torch.ops.vqkernels_cuda.<name>
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OPS = torch.library.Library("vqkernels", "DEF")
_NATIVE = {
    device: torch.library.Library(f"vqkernels_{device}", "DEF") for device in ("cpu", "cuda")
}


Kernels = Callable[[str], Callable[..., Any]]  # by backend


def define(schema: str, reference: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define the op `schema`, which leaves out the trailing `str backend`."""
    return define_with_kernels(schema, reference)[0]


def define_with_kernels(
    schema: str, reference: Callable[..., Any]
) -> tuple[torch._ops.OpOverload, Kernels]:
    """As `define`; the op, and its kernels for calls that need no dispatcher: see `_direct`."""
    kernel = _kernels_of(schema, reference)
    return define_as(schema, lambda *args: kernel(args[-1])(*args[:-1])), kernel


def define_writing(
    schema: str, reference: Callable[..., Any]
) -> tuple[torch._ops.OpOverload, Kernels]:
    """As `define_with_kernels`, for an op that can also write its results into given tensors:
    kernels take a list of those behind the schema's arguments; an empty one asks for new ones."""
    arguments, results = schema.rsplit(") -> ", 1)

    def write(*args: Any) -> Any:
        *inputs, out = args
        found = reference(*inputs)
        results = (found,) if isinstance(found, Tensor) else found
        for tensor, result in zip(out, results, strict=False):
            tensor.copy_(result)
        return found

    kernel = _kernels_of(f"{arguments}, Tensor[] out) -> {results}", write)
    return define_as(schema, lambda *args: kernel(args[-1])(*args[:-1], [])), kernel


def _kernels_of(schema: str, reference: Callable[..., Any]) -> Kernels:
    name = schema[: schema.index("(")]
    kernels: dict[str, Callable[..., Any]] = {"reference": reference}
    for device, library in _NATIVE.items():
        library.define(schema)
        kernels[device] = getattr(getattr(torch.ops, f"vqkernels_{device}"), name).default

    def kernel(backend: str) -> Callable[..., Any]:
        if backend == "triton" and backend not in kernels:
            kernels[backend] = getattr(importlib.import_module("vqkernels.triton"), name)
        return kernels[backend]

    return kernel


def define_as(schema: str, run: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define the op `schema`, without its trailing `str backend`, as a function that takes it."""
    name = schema[: schema.index("(")]
    arguments, results = schema[len(name) :].rsplit(") -> ", 1)
    tags = (torch.Tag.pt2_compliant_tag,)
    _OPS.define(f"{name}{arguments}, str backend) -> {results}", tags=tags)
    _OPS.impl(name, run, "CompositeExplicitAutograd")
    overload: torch._ops.OpOverload = getattr(torch.ops.vqkernels, name).default
    return overload


def fake(op: torch._ops.OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(op.name(), lib=_OPS)


def differentiable(
    op: torch._ops.OpOverload, backward: Callable[..., Any], save: Callable[..., None]
) -> None:
    torch.library.register_autograd(op.name(), backward, setup_context=save, lib=_OPS)


def not_differentiable(op: torch._ops.OpOverload, reason: str) -> None:
    """Make a gradient through `op` an error that says why, instead of a silent zero."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"vqkernels.{op._opname}: {reason}")

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    differentiable(op, backward, save)
