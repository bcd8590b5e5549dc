"""What `setup.py` says about the build, and compiling with it."""

from __future__ import annotations

import functools
import runpy
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
TABLE_CHECK = ROOT / "csrc/testing/table_check.cpp"


@functools.cache
def build_script() -> dict[str, Any]:
    """The names that `setup.py` defines, without building anything."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def compile_with(compiler: str, *arguments: str | Path) -> None:
    """Run the compiler; fails with what it says."""
    command = [*compiler.split(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stderr[-6000:]}"


def table_version() -> str:
    """The flag that makes objects of one build accept each other."""
    return f"-DVQKERNELS_TABLE_VERSION={build_script()['table_version']()}"


def compile_table_check(compiler: str, program: Path) -> Path:
    """The C++ program that checks kernel tables against float64 loops."""
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", table_version()]
    compile_with(compiler, *flags, TABLE_CHECK, "-o", program, "-ldl")
    return program
