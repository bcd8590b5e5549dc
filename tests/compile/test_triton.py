"""Triton kernels compiled for GPUs that are not here, and what they need there.

`resources.csv` holds the accepted registers, shared memory and spills of each kernel, per Triton
version. A kernel that needs more fails; `VQKERNELS_WRITE_RESOURCES=1 pytest tests/compile` writes
the table anew, so that the difference stands in the review.
"""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from launches import Variant, variants  # noqa: E402
from targets import CAPABILITIES, SHARED_LIMIT, Compiled, Launch, compiled, recorded  # noqa: E402

from vqkernels.triton.configs import TILE_CONFIGS, family, select_lanes, select_tiles  # noqa: E402

_TABLE = Path(__file__).with_name("resources.csv")
_COLUMNS = (
    "triton", "target", "kernel", "variant", "registers", "shared", "spills", "tensor", "reason",
)  # fmt: skip
_VERSION = ".".join(triton.__version__.split(".")[:2])
_WRITE = os.environ.get("VQKERNELS_WRITE_RESOURCES") == "1"
_ALL = [variant for capability in CAPABILITIES for variant in variants(capability)]

# A score costs a subtraction or a multiply-add, a minimum, a comparison and a selection.
_MINIMUM_INSTRUCTIONS = ("FADD", "FADD2", "FFMA", "FFMA2", "FMNMX", "FSETP", "FSEL", "SEL")
_OPERATIONS_A_SCORE = 4.2


def _accepted() -> dict[tuple[str, ...], dict[str, str]]:
    if not _TABLE.exists():
        return {}
    with _TABLE.open(newline="") as file:
        return {tuple(row[name] for name in _COLUMNS[:4]): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def table():
    """The accepted rows; written anew after the module's tests if asked to."""
    rows = _accepted()
    yield rows
    if _WRITE:
        with _TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows))


@pytest.mark.parametrize("variant", _ALL, ids=str)
def test_compiles_within_its_means(variant: Variant, table):
    launches = recorded(variant.call, variant.capability)
    launch = next(one for one in launches if one.kernel.__name__ == variant.kernel)
    result = compiled(launch, variant.capability)

    assert "tf32" not in result.ptx
    assert result.shared <= SHARED_LIMIT[variant.capability]
    assert result.tensor_instruction == _promised(variant, launch)
    assert not _narrow_offsets(result.ttir)
    assert not any(loop["LDL"] + loop["STL"] for loop in result.loops), "spills in a loop"
    if variant.config is not None and variant.config.rows == 0:
        _check_minimum(result, variant)
    _compare(variant, result, table)


def _narrow_offsets(ttir: str) -> list[str]:
    """32-bit offsets into half-precision rows and codes. One that a scalar argument was spread
    from is wide enough: an argument beyond 32 bits arrives as 64."""
    spread = set(re.findall(r"(%\S+) = tt\.splat", ttir))
    adds = re.findall(r"(addptr \S+ (%\S+) : .*!tt\.ptr<b?f16>.*xi32>)", ttir)
    return [line for line, offset in adds if offset not in spread]


def _promised(variant: Variant, launch: Launch) -> str:
    if variant.kernel != "search_tiles":
        return "none"
    if launch.meta["BLOCK_N"] < 64:
        return "mma.sync"
    names = {"hopper": "wgmma.mma_async", "blackwell": "tcgen05.mma"}
    return names.get(family(variant.capability), "mma.sync")


def _check_minimum(result: Compiled, variant: Variant) -> None:
    """The running minimum takes few operations a score and stays within a thread."""
    config = variant.config
    scores = config.block_n * config.block_k / (32 * config.num_warps)
    loops = [loop for loop in result.loops if loop["FMNMX"] >= 0.9 * scores / 2]
    if config.dim == 0:  # the minimum stands around the loop over chunks of D
        return
    assert loops
    for loop in loops:
        assert loop["SHFL"] == 0
        operations = sum(loop[name] for name in _MINIMUM_INSTRUCTIONS)
        assert operations <= _OPERATIONS_A_SCORE * scores


def _compare(variant: Variant, result: Compiled, table) -> None:
    key = (_VERSION, f"sm_{variant.capability}", variant.kernel, variant.name)
    row = dict(zip(_COLUMNS, key, strict=False))
    row["registers"], row["shared"] = str(result.registers), str(result.shared)
    row["spills"], row["tensor"] = str(result.spills), result.tensor_instruction
    before = table.get(key)
    row["reason"] = before["reason"] if before else ""
    if _WRITE:
        table[key] = row
        return
    if not any(known[0] == _VERSION for known in table):
        pytest.skip(f"no accepted resources for Triton {_VERSION}")
    assert before is not None, f"no accepted resources for {variant}"
    for name in ("registers", "shared", "spills"):
        assert int(row[name]) <= int(before[name]), f"{variant} needs more {name}"
    assert result.spills == 0 or row["reason"], f"{variant} spills without a reason"


def test_every_kind_of_search_has_a_row():
    for capability in (80, 86, 89, *CAPABILITIES, 103, 121):
        for products in ("native", "split"):
            for dim in (1, 5, 16, 17, 63, 64, 65, 96, 128, 160, 256, 257, 1000):
                for rows in (1, 32, 33, 100000):
                    config = select_tiles(capability, products, dim, rows)
                    assert config.rows == 0 or rows <= config.rows
                    assert config.dim == 0 or dim <= config.dim
    for dim in range(1, 17):
        assert select_lanes(dim).dim >= dim
    with pytest.raises(ValueError, match=r"8\.0"):
        select_tiles(75, "native", 64, 64)


def test_every_row_can_be_selected():
    targets = (80, 86, *CAPABILITIES)
    selected = {
        select_tiles(capability, products, dim, rows)
        for capability in targets
        for products in ("native", "split")
        for dim in (16, 64, 128, 256, 512)
        for rows in (16, 4096)
    }
    assert selected == set(TILE_CONFIGS)
