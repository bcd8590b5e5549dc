"""Compile, for GPUs that are not here, exactly what a launcher would launch.

`recorded` runs a launcher on tensors without memory and notes its launches; `compiled` specializes
each as Triton's own launch would (1 is a constant, multiples of 16 and aligned pointers are marked)
and compiles it down to machine code.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vqkernels.triton import launch

CAPABILITIES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    kernel: Any
    programs: int
    args: tuple[Any, ...]
    meta: dict[str, Any]


def recorded(call: Callable[[], Any], capability: int) -> list[Launch]:
    """The launches of `call` on a GPU of this capability."""
    launches: list[Launch] = []
    facts = launch.DeviceFacts(capability, _MULTIPROCESSORS[capability])
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
        registers: of a thread.
        spills: instructions that store to or load from a thread's own memory.
        loops: how often each instruction stands in each innermost loop.
    """

    ptx: str
    ttir: str
    shared: int
    registers: int
    spills: int
    loops: list[collections.Counter[str]]

    @property
    def tensor_instruction(self) -> str:
        return next((name for name in TENSOR_INSTRUCTIONS if name in self.ptx), "none")


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
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    all_instructions = _instructions(code)
    return Compiled(
        built.asm["ptx"],
        built.asm["ttir"],
        built.metadata.shared,
        int(registers[1]),
        all_instructions["STL"] + all_instructions["LDL"],
        _innermost_loops(code),
    )


def _instructions(code: str) -> collections.Counter[str]:
    names = re.findall(r"\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_]+)", code)
    return collections.Counter(names)


def _innermost_loops(code: str) -> list[collections.Counter[str]]:
    """Instructions between a label and the last jump back to it, where no other loop lies."""
    lines = code.splitlines()
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if line.startswith(".L_x_")}
    ranges: dict[int, int] = {}
    for i, line in enumerate(lines):
        jump = re.search(r"BRA.*?(\.L_x_\d+)", line)
        if jump and labels.get(jump[1], i) < i:
            ranges[labels[jump[1]]] = i
    return [
        _instructions("\n".join(lines[first:last]))
        for first, last in ranges.items()
        if not any(first < other and end < last for other, end in ranges.items())
    ]


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
    if value == 1:
        constants[path] = 1
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([_TOOLS / tool, *args], capture_output=True, text=True, check=True)
    return done.stdout
