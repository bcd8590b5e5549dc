"""What kernels need on each GPU, and what they were accepted to need.

`benchmarks/results/gpu-resources.csv` holds the accepted registers, shared memory and spills of
each kernel for each compiler and target. A kernel that needs more fails, and so does one that
spills without a reason beside its row; `VQKERNELS_WRITE_RESOURCES=1 pytest tests/compile` writes
the table anew, so that the difference stands in the review.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks/results/gpu-resources.csv"
COLUMNS = (
    "compiler", "target", "kernel", "variant", "registers", "shared", "spills", "tensor",
    "occupancy", "reason",
)  # fmt: skip
WRITES = os.environ.get("VQKERNELS_WRITE_RESOURCES") == "1"

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of one multiprocessor share: CUDA programming guide, compute capabilities."""

    warps: int
    blocks: int
    shared: int
    shared_block: int
    count: int


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10, 163 << 10, 108),
    90: Multiprocessor(64, 32, 228 << 10, 227 << 10, 132),
    100: Multiprocessor(64, 32, 228 << 10, 227 << 10, 148),
    120: Multiprocessor(48, 24, 100 << 10, 99 << 10, 170),
}
_REGISTERS_OF_PARTITION, _PARTITIONS = 16384, 4
_TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Needs:
    """Of one kernel: registers a thread, bytes of shared memory a block, instructions that spill,
    the tensor-core instruction and how often it stands there, threads a block, columns of tensor
    memory (10.x)."""

    registers: int
    shared: int
    spills: int
    tensor: str
    tensor_count: int
    threads: int
    tensor_columns: int = 0


def capability_of(target: str) -> int:
    return int(re.sub(r"\D", "", target))


def occupancy(capability: int, needs: Needs) -> tuple[int, int]:
    """Blocks that one multiprocessor holds, and warps of a block."""
    of = MULTIPROCESSORS[capability]
    warps = -(-needs.threads // 32)
    registers_of_warp = -(-needs.registers * 32 // 256) * 256
    by_registers = _REGISTERS_OF_PARTITION // registers_of_warp * _PARTITIONS // warps
    by_shared = of.shared // (-(-(needs.shared + 1024) // 128) * 128)
    blocks = min(of.blocks, of.warps // warps, by_registers, by_shared)
    if needs.tensor_columns:
        blocks = min(blocks, _TENSOR_MEMORY_COLUMNS // needs.tensor_columns)
    return blocks, warps


class Table:
    """The accepted rows, and those seen in this run."""

    def __init__(self) -> None:
        self.rows: dict[Key, dict[str, str]] = {}
        self.seen: dict[Key, dict[str, str]] = {}
        if PATH.exists():
            with PATH.open(newline="") as file:
                for row in csv.DictReader(file):
                    self.rows[tuple(row[name] for name in COLUMNS[:4])] = row

    def check(self, key: Key, needs: Needs) -> None:
        """Compare with the accepted row."""
        capability = capability_of(key[1])
        blocks, warps = occupancy(capability, needs)
        before = self.rows.get(key)
        row = dict(zip(COLUMNS, key, strict=False)) | {
            "registers": str(needs.registers),
            "shared": str(needs.shared),
            "spills": str(needs.spills),
            "tensor": f"{needs.tensor} {needs.tensor_count}" if needs.tensor_count else "none",
            "occupancy": f"{blocks}x{warps}/{MULTIPROCESSORS[capability].warps}",
            "reason": before["reason"] if before else "",
        }
        self.seen[key] = row
        most = MULTIPROCESSORS[capability].shared_block
        assert needs.shared <= most, f"{needs.shared} bytes of shared memory, a block has {most}"
        assert blocks > 0, "a block does not fit into a multiprocessor"
        if WRITES or not self.knows(key[0]):
            return
        assert before is not None, f"no accepted resources for {' '.join(key)}"
        for name in ("registers", "shared", "spills"):
            assert int(row[name]) <= int(before[name]), f"{' '.join(key)} needs more {name}"
        tensor = [of["tensor"].split()[0] for of in (row, before)]
        assert tensor[0] == tensor[1], f"{' '.join(key)} has {tensor[0]}, not {tensor[1]}"
        assert needs.spills == 0 or row["reason"], f"{' '.join(key)} spills without a reason"

    def knows(self, compiler: str) -> bool:
        return any(key[0] == compiler for key in self.rows)

    def skip_if_unknown(self, compiler: str) -> None:
        """After what a test asserts of any compiler's code."""
        if not WRITES and not self.knows(compiler):
            pytest.skip(f"no accepted resources for {compiler}")

    def assert_no_others(self, compiler: str, keys: Iterable[Key]) -> None:
        """No row of this compiler is left over from a kernel that is gone."""
        wanted = set(keys)
        left_over = {key for key in self.rows if key[0] == compiler and key not in wanted}
        if WRITES:
            for key in left_over:
                del self.rows[key]
        else:
            assert not left_over

    def take_over(self, path: Path) -> None:
        """What another process saw."""
        for row in json.loads(path.read_text()):
            self.seen[tuple(row[name] for name in COLUMNS[:4])] = row

    def write(self) -> None:
        self.rows |= self.seen
        with PATH.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows[key] for key in sorted(self.rows, key=_order))

    def lines(self) -> Iterable[str]:
        """Of this run, a line a kernel and variant, with the targets side by side."""
        targets = sorted({_family(key[1]) for key in self.seen}, key=capability_of)
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for compiler in sorted({key[0] for key in self.seen}):
            cells.clear()
            for key, row in self.seen.items():
                if key[0] == compiler:
                    cells.setdefault(key[2:], {})[_family(key[1])] = _cell(row)
            width = max(len(" ".join(names)) for names in cells)
            yield ""
            yield f"{compiler}: registers, shared memory, spills, blocks x warps / most, tensor"
            yield "  ".join([" " * width, *(f"{target:<31}" for target in targets)]).rstrip()
            for names in sorted(cells):
                found = (f"{cells[names].get(target, '-'):<31}" for target in targets)
                yield "  ".join([f"{' '.join(names):<{width}}", *found]).rstrip()


def _family(target: str) -> str:
    return f"sm_{capability_of(target)}"


def _cell(row: dict[str, str]) -> str:
    name, _, count = row["tensor"].partition(" ")
    short = "" if name == "none" else f" {name.split('.')[0]} {count}"
    spills = f" {row['spills']}s" if row["spills"] != "0" else ""
    size = int(row["shared"])
    shared = f"{size}B" if size < 1024 else f"{size / 1024:.3g}K"
    return f"{row['registers']}r {shared}{spills} {row['occupancy']}{short}"


def _order(key: Key) -> tuple[str, int, str, str]:
    return key[0], capability_of(key[1]), key[2], key[3]


TABLE = Table()
