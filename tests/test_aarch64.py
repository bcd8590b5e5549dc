"""The 64-bit Arm kernels, cross-compiled, and run by an emulator of that processor."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from _helpers.builds import ROOT, build_script, compile_table_check, compile_with, table_version

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
LIBRARIES = Path("/usr/aarch64-linux-gnu")

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed"
)


@pytest.fixture(scope="module")
def table_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_table_check(COMPILER, tmp_path_factory.mktemp("check") / "table_check")


def flags_of(name: str) -> list[str]:
    script = build_script()
    flags = f"-std=c++17 {script['COMMON']} {script['CAPABILITIES']['aarch64'][name]}"
    return [*flags.split(), table_version(), f'-DVQKERNELS_CAPABILITY="{name}"']


@pytest.mark.parametrize("name", ["portable", "neon"])
def test_tables_agree_with_float64_loops(table_check: Path, tmp_path: Path, name: str) -> None:
    table = tmp_path / f"libvqkernels_cpu_{name}.so"
    source = ROOT / "csrc/cpu/kernel_table.cpp"
    compile_with(COMPILER, *flags_of(name), "-shared", source, "-o", table)
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"it compiles, but {EMULATOR} is not installed to run it")
    command = [EMULATOR, "-L", str(LIBRARIES), str(table_check), str(table)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{name}: ok, "), done.stdout


def test_every_capability_of_the_build_is_covered() -> None:
    assert set(build_script()["CAPABILITIES"]["aarch64"]) == {"portable", "neon"}


@pytest.mark.parametrize("source", sorted((ROOT / "csrc/ops").glob("*.cpp")), ids=lambda p: p.stem)
def test_ops_use_no_header_of_another_processor(source: Path) -> None:
    script = build_script()
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    include = Path(spec.origin).parent / "include"
    compile_with(
        COMPILER,
        *f"-std=c++20 {script['COMMON']} -fsyntax-only".split(),
        f"-DTORCH_TARGET_VERSION={script['TORCH_TARGET']}",
        "-isystem",
        include,
        source,
    )
