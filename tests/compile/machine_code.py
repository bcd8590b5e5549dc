"""Reading NVIDIA machine code: registers and memory of a kernel, its instructions, its loops."""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TENSOR_INSTRUCTION = re.compile(r"[HIQ]G?MMA|UTC[A-Z]*MMA")


@functools.cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the path, or as Triton brings it along."""
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else Path()
    return shutil.which(name) or shutil.which(name, path=str(beside))


def output_of(name: str, *arguments: str | Path) -> str:
    found = tool(name)
    assert found is not None, f"{name} was not found"
    done = subprocess.run([found, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@dataclass(frozen=True)
class Code:
    """One kernel for one target.

    Attributes:
        registers: of a thread.
        static_shared: bytes of shared memory that the kernel declares.
        instructions: how often each stands in it.
        loops: the same for each loop, those around others included.
        innermost_loops: the same for those around no other.
        wide: accesses of global memory by 16 bytes a thread, LDG and STG.
    """

    registers: int
    static_shared: int
    instructions: collections.Counter[str]
    loops: list[collections.Counter[str]]
    innermost_loops: list[collections.Counter[str]]
    wide: collections.Counter[str]

    @staticmethod
    def of(registers: int, static_shared: int, lines: list[str]) -> Code:
        ranges = _loops(lines)
        innermost = [
            (first, last)
            for first, last in ranges
            if not any(first < other and end < last for other, end in ranges)
        ]
        counts = [
            [instructions(lines[first:last]) for first, last in found]
            for found in (ranges, innermost)
        ]
        wide = re.findall(r"\b(LDG|STG)\.E\S*\.128\b", "\n".join(lines))
        return Code(
            registers, static_shared, instructions(lines), *counts, collections.Counter(wide)
        )

    @property
    def spills(self) -> int:
        """Instructions that store to or load from a thread's own memory."""
        return self.instructions["STL"] + self.instructions["LDL"]

    @property
    def tensor_instructions(self) -> int:
        counts = self.instructions.items()
        return sum(count for name, count in counts if TENSOR_INSTRUCTION.fullmatch(name))


def kernels_of(path: Path) -> dict[tuple[str, str], Code]:
    """(target, mangled name) and the code of every kernel in an object."""
    usage: dict[tuple[str, str], tuple[int, int]] = {}
    target = name = ""
    for line in output_of("cuobjdump", "-res-usage", path).splitlines():
        if found := re.match(r"arch = (\w+)", line):
            target = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) .*SHARED:(\d+)", line):
            usage[target, name] = int(found[1]), int(found[2])
    bodies: dict[tuple[str, str], list[str]] = {}
    body: list[str] = []
    for line in output_of("cuobjdump", "-sass", path).splitlines():
        if found := re.match(r"arch = (\w+)", line):
            target = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            body = bodies.setdefault((target, found[1]), [])
        else:
            body.append(line)
    return {
        key: Code.of(registers, max(0, shared - _system_shared(key[0])), bodies[key])
        for key, (registers, shared) in usage.items()
    }


def _system_shared(target: str) -> int:
    """From 9.0 on, what the system keeps for itself is counted with a kernel's own."""
    return 1024 if int(re.sub(r"\D", "", target)) >= 90 else 0


def targets_of(path: Path) -> tuple[set[str], set[str]]:
    """What an object has machine code for, and what text."""
    listed = output_of("cuobjdump", "--list-elf", "--list-ptx", path)
    found = re.findall(r"\.(sm_\w+)\.(cubin|ptx)", listed)
    return tuple({arch for arch, kind in found if kind == of} for of in ("cubin", "ptx"))


def instructions(lines: list[str]) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for line in lines:
        match = re.search(r"\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_]+)", line)
        if match:
            found[match[1]] += 1
    return found


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """From each place to the last jump back to it.

    nvdisasm names places by labels, cuobjdump by addresses.
    """
    places: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = i
        elif address := re.match(r"\s*/\*([0-9a-f]+)\*/\s", line):
            places[f"0x{int(address[1], 16):x}"] = i
        if jump := re.search(r"\bBRA.*?(\.L_x_\d+|0x[0-9a-f]+)", line):
            jumps.append((i, jump[1]))
    ranges: dict[int, int] = {}
    for i, to in jumps:
        if places.get(to, i) < i:
            ranges[places[to]] = i
    return list(ranges.items())


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()
