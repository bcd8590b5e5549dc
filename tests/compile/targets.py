"""Compile, for GPUs that are not here, exactly what a launcher would launch.

`recorded` runs a launcher on tensors without memory and notes its launches; `compiled` specializes
each as Triton's own launch would (1 is a constant, multiples of 16 and aligned pointers are marked)
and compiles it down to machine code.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from machine_code import Code, output_of
from resource_table import MULTIPROCESSORS, Needs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vqkernels.triton import launch

CAPABILITIES = tuple(MULTIPROCESSORS)
TENSOR_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    programs: int
    args: tuple[Any, ...]
    meta: dict[str, Any]


def recorded(call: Callable[[], Any], capability: int) -> list[Launch]:
    """The launches of `call` on a GPU of this capability."""
    launches: list[Launch] = []
    facts = launch.DeviceFacts(capability, MULTIPROCESSORS[capability].count)
    before = launch._start, launch._INTERPRETED
    launch._start = lambda *what: launches.append(Launch(*what))
    launch._INTERPRETED = facts
    try:
        call()
    finally:
        launch._start, launch._INTERPRETED = before
    return launches


@dataclass(frozen=True)
class Compiled:
    """Machine code of one launch.

    Attributes:
        ptx, ttir: text forms.
        shared: bytes of shared memory a program.
        threads: of a program.
        tensor_columns: of tensor memory that a program takes.
        code: the instructions.
    """

    ptx: str
    ttir: str
    shared: int
    threads: int
    tensor_columns: int
    code: Code

    @property
    def tensor_instruction(self) -> str:
        return next((name for name in TENSOR_INSTRUCTIONS if name in self.ptx), "none")

    @property
    def needs(self) -> Needs:
        code = self.code
        return Needs(
            code.registers,
            self.shared,
            code.spills,
            self.tensor_instruction,
            code.tensor_instructions,
            self.threads,
            self.tensor_columns,
        )


def compiled(what: Launch, capability: int) -> Compiled:
    names = what.kernel.arg_names
    options = {name: value for name, value in what.meta.items() if name not in names}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = {**dict(zip(names, what.args, strict=False)), **what.meta}
    for i, name in enumerate(names):
        if name in what.meta:
            signature[name] = "constexpr"
            constants[(i,)] = values[name]
        else:
            signature[name] = _specialized((i,), values[name], constants, attributes)
    built = triton.compile(
        ASTSource(what.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = output_of("cuobjdump", "-res-usage", file.name)
        code = output_of("nvdisasm", "-c", file.name).splitlines()
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return Compiled(
        built.asm["ptx"],
        built.asm["ttir"],
        built.metadata.shared,
        built.metadata.num_warps * 32,
        getattr(built.metadata, "tmem_size", 0) or 0,
        Code.of(int(registers[1]), built.metadata.shared, code),
    )


def _specialized(
    path: tuple[int, ...], value: Any, constants: dict[Any, Any], attributes: dict[Any, Any]
) -> Any:
    if isinstance(value, tuple):
        parts = (
            _specialized((*path, i), part, constants, attributes) for i, part in enumerate(value)
        )
        return tuple(parts)
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        constants[path] = value
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
