"""Kernel tables as a C++ program uses them: `csrc/testing/table_check.cpp`, no torch, no Python."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from _helpers.builds import build_script, compile_table_check

from vqkernels import info, native


@pytest.fixture(scope="module")
def table_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = build_script()
    try:
        compiler = script["compiler"]()
    except script["NativeBuildError"] as error:
        pytest.skip(str(error))
    return compile_table_check(compiler, tmp_path_factory.mktemp("check") / "table_check")


def run(table_check: Path, *tables: Path) -> subprocess.CompletedProcess[str]:
    command = [str(table_check), *map(str, tables)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", info.runnable_tables())
def test_every_table_agrees_with_float64_loops(table_check: Path, name: str) -> None:
    (table,) = native.DIRECTORY.glob(f"libvqkernels_cpu_{name}.*")
    done = run(table_check, table)
    assert done.returncode == 0, done.stdout
    checks = re.fullmatch(rf"{name}: ok, (\d+) checks, 0 wrong\n", done.stdout)
    assert checks is not None, done.stdout
    assert int(checks[1]) > 30_000


def test_a_foreign_object_is_refused(table_check: Path, tmp_path: Path) -> None:
    text = tmp_path / "libvqkernels_cpu_text.so"
    text.write_text("not an object")
    assert run(table_check, text).returncode == 2
    assert run(table_check, native.OPS_OBJECT).returncode == 2
