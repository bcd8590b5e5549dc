"""Finding and loading the native CPU object; says why when there is none."""

from __future__ import annotations

import ctypes
import sys
import warnings
from pathlib import Path

import torch

DIRECTORY = Path(__file__).parent / "lib"
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
OPS_OBJECT = DIRECTORY / f"libvqkernels_ops{_SUFFIX}"

problem: str | None = "not loaded yet"


def load() -> None:
    """Load the ops object, once, at import. Leaves the reason in `problem` if it can't."""
    global problem
    if not OPS_OBJECT.exists():
        problem = f"no native kernels were built ({OPS_OBJECT.name} is missing)"
        return
    try:
        torch.ops.load_library(str(OPS_OBJECT))
        problem = _message("vqkernels_cpu_problem")
    except (OSError, AttributeError) as error:
        problem = f"{OPS_OBJECT.name} could not be loaded: {error}"
    if problem is not None:
        warnings.warn(
            f"vqkernels: {problem}. Falling back to the PyTorch references; "
            "reinstall vqkernels for this platform to get its CPU kernels.",
            RuntimeWarning,
            stacklevel=2,
        )


def capability() -> str | None:
    """The instruction set whose kernels run: "avx512_vnni_bf16", "avx512", "avx2", "neon" or
    "portable"; None without native kernels."""
    return None if problem is not None else _message("vqkernels_cpu_capability")


def _message(function: str) -> str | None:
    call = getattr(ctypes.CDLL(str(OPS_OBJECT)), function)
    call.restype = ctypes.c_char_p
    answer = call()
    return answer.decode() if answer else None
