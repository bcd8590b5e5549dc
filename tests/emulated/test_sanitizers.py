"""Tests of this folder once more, under AddressSanitizer and UBSan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from emulator import KERNELS, SELFTEST, asan_environment, build, modes

pytestmark = pytest.mark.skipif(modes() == ["asan"], reason="starts the process that this is")

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("sources", "tests", "chosen"),
    [
        (SELFTEST, ["test_emulation.py"], ""),
        # These take every path; the others vary the data.
        (KERNELS, ["test_emulated_*.py"], "in_every_order or shapes"),
    ],
    ids=["emulation", "kernels"],
)
def test_sanitizers_find_nothing(sources: tuple[Path, ...], tests: list[str], chosen: str) -> None:
    build("asan", sources)  # a compiler needs no sanitizer's library in front of it
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-s"]
        + ["-k", chosen]
        + [str(path) for name in tests for path in sorted(HERE.glob(name))],
        env=asan_environment(),
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
