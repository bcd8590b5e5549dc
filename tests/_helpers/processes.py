"""Python processes with an environment of their own, and the instruction sets to run them with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import vqkernels
from vqkernels import native

PACKAGE = Path(vqkernels.__file__).parent
TESTS = Path(__file__).parents[1]
_SETTINGS = ("VQKERNELS_BACKEND", "VQKERNELS_CPU_CAPABILITY")


def run_python(
    *arguments: str, package: Path = PACKAGE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this Python on `arguments` with vqkernels from `package` and these variables set."""
    env = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
    paths = [str(package.parent), str(TESTS), env.get("PYTHONPATH", "")]
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=TESTS, timeout=300)


def output_of(code: str, **environment: str) -> str:
    """What `code` prints; fails with its error output if it fails."""
    done = run_python("-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def built_capabilities() -> list[str]:
    """The instruction sets that were built, whether or not this processor has them."""
    prefix = "libvqkernels_cpu_"
    return sorted(path.stem[len(prefix) :] for path in native.DIRECTORY.glob(f"{prefix}*"))


def runnable_capabilities() -> list[str]:
    """Those of them that this processor has."""
    supported = native.capabilities()
    return [name for name in built_capabilities() if supported.get(name, False)]
