"""Runs each `case_*.py` of this folder in a process of its own under Triton's interpreter.

`TRITON_INTERPRET` decides what `triton.jit` makes of a kernel when its file is imported, so these
cases cannot share a process with tests that compile the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vqkernels

pytest.importorskip("triton")

_HERE = Path(__file__).parent
_CASES = sorted(path.name for path in _HERE.glob("case_*.py"))


@pytest.mark.parametrize("case", _CASES)
def test_interpreted(case: str) -> None:
    package = str(Path(vqkernels.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONPATH=paths)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", case]
    done = subprocess.run(command, cwd=_HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
