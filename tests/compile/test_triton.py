"""Triton kernels compiled for GPUs that are not here, and what they need there.

The newest Triton runs in this process. A Triton 3.6 runs in another one, where a folder has it:
`VQKERNELS_TRITON_3_6`, by default `.venv/triton-3.6`, where `make test` puts it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from launches import Variant, variants  # noqa: E402
from noise_launches import WIDE  # noqa: E402
from resource_table import TABLE  # noqa: E402
from targets import CAPABILITIES, Compiled, Launch, compiled, recorded  # noqa: E402

from vqkernels.triton.configs import TILE_CONFIGS, family, select_lanes, select_tiles  # noqa: E402

_VERSION = ".".join(triton.__version__.split(".")[:2])
_COMPILER = f"triton {_VERSION}"
_OLDER = "3.6"
_OLDER_PATH = Path(
    os.environ.get("VQKERNELS_TRITON_3_6") or Path(__file__).parents[2] / ".venv/triton-3.6"
)
_TILES = (
    f"{Path(__file__).with_name('test_triton_attention.py')}"
    "::test_shared_memory_holds_masks_and_dropout"
)
_ALL = [variant for capability in CAPABILITIES for variant in variants(capability)]

# A score costs a subtraction or a multiply-add, a minimum, a comparison and a selection.
_MINIMUM_INSTRUCTIONS = ("FADD", "FADD2", "FFMA", "FFMA2", "FMNMX", "FSETP", "FSEL", "SEL")
_OPERATIONS_A_SCORE = 4.2


def _key(compiler: str, variant: Variant) -> tuple[str, str, str, str]:
    return compiler, f"sm_{variant.capability}", variant.kernel, variant.name


@pytest.fixture(scope="module", autouse=True)
def older(request, tmp_path_factory) -> Iterator[subprocess.Popen[str] | None]:
    """This file and attention's tiles under Triton 3.6, beside this process, if that is wanted."""
    wanted = any("test_under_triton" in item.name for item in request.session.items)
    if not wanted or _VERSION == _OLDER or not (_OLDER_PATH / "triton").is_dir():
        yield None
        return
    folder = tmp_path_factory.mktemp("older")
    paths = [str(_OLDER_PATH), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VQKERNELS_RESOURCES_SEEN": str(folder / "seen.json"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, _TILES]
    with (
        (folder / "output").open("w+") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        process.folder = folder
        yield process
        process.kill()


@pytest.mark.parametrize("variant", _ALL, ids=str)
def test_compiles_within_its_means(variant: Variant):
    launches = recorded(variant.call, variant.capability)
    launch = next(one for one in launches if one.kernel.__name__ == variant.kernel)
    result = compiled(launch, variant.capability)

    assert "tf32" not in result.ptx
    assert result.tensor_instruction == _promised(variant, launch)
    assert not _narrow_offsets(result.ttir)
    assert not any(loop["LDL"] + loop["STL"] for loop in result.code.innermost_loops), (
        "spills in a loop"
    )
    if wide := WIDE.get((variant.kernel, variant.name)):
        assert (result.code.wide["LDG"], result.code.wide["STG"]) == wide
        assert result.shared == 0 or variant.kernel == "_sum_losses", "normals change hands"
    if variant.config is not None and variant.config.rows == 0:
        _check_minimum(result, variant)
    TABLE.check(_key(_COMPILER, variant), result.needs)
    TABLE.skip_if_unknown(_COMPILER)


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
    loops = [loop for loop in result.code.innermost_loops if loop["FMNMX"] >= 0.9 * scores / 2]
    if config.dim == 0:  # the minimum stands around the loop over chunks of D
        return
    assert loops
    for loop in loops:
        assert loop["SHFL"] == 0
        operations = sum(loop[name] for name in _MINIMUM_INSTRUCTIONS)
        assert operations <= _OPERATIONS_A_SCORE * scores


def test_under_triton_3_6(older):
    if older is None:
        reason = "runs it" if _VERSION == _OLDER else f"no Triton {_OLDER} in {_OLDER_PATH}"
        pytest.skip(f"this process {reason}" if _VERSION == _OLDER else reason)
    code = older.wait(timeout=1200)
    output = (older.folder / "output").read_text()
    assert code == 0, output[-6000:]
    assert not re.search("no accepted resources", output), output[-2000:]
    TABLE.take_over(older.folder / "seen.json")
    assert {_key(f"triton {_OLDER}", variant) for variant in _ALL} <= set(TABLE.seen)


def test_no_row_is_left_over():
    for compiler in {_COMPILER, f"triton {_OLDER}"}:
        TABLE.assert_no_others(compiler, [_key(compiler, variant) for variant in _ALL])


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
