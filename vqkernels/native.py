"""Finding and loading the native objects; says why when there is none."""

from __future__ import annotations

import ctypes
import json
import re
import sys
import warnings
from pathlib import Path

import torch

DIRECTORY = Path(__file__).parent / "lib"
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
OPS_OBJECT = DIRECTORY / f"libvqkernels_ops{_SUFFIX}"
CUDA_OBJECT = DIRECTORY / "libvqkernels_cuda.so"

problem: str | None = "not loaded yet"
cuda_problem: str | None = "not loaded yet"
# What the CUDA object was compiled for, such as "80+PTX 90a"; empty without one.
cuda_targets: str = ""


def load() -> None:
    """Load the ops objects, once, at import. Leaves the reason in `problem` and `cuda_problem` if
    it can't."""
    global problem, cuda_problem, cuda_targets
    if OPS_OBJECT.exists():
        failure, answer = _load(OPS_OBJECT, "vqkernels_cpu_problem")
        problem = failure or answer
        if problem is not None:
            _warn(
                f"{problem}. Falling back to the PyTorch references; reinstall vqkernels for this "
                "platform to get its CPU kernels."
            )
    else:
        problem = f"no native kernels were built ({OPS_OBJECT.name} is missing)"
    cuda_problem = _cannot_load_cuda()
    if cuda_problem is None:
        cuda_problem, answer = _load(CUDA_OBJECT, "vqkernels_cuda_targets")
        cuda_targets = answer or ""
        if cuda_problem is not None:
            _warn(f"{cuda_problem}. GPU tensors run on Triton or the PyTorch references.")


def capability() -> str | None:
    """The instruction set whose kernels run: "avx512_vnni_bf16", "avx512", "avx2", "neon" or
    "portable"; None without native kernels."""
    return None if problem is not None else _message(OPS_OBJECT, "vqkernels_cpu_capability")


def capabilities() -> dict[str, bool]:
    """The instruction sets that kernels can be built for, and whether this processor has them;
    empty without an ops object."""
    try:
        listed = _message(OPS_OBJECT, "vqkernels_cpu_capabilities") or ""
    except (OSError, AttributeError):
        return {}
    pairs = (item.split("=") for item in listed.split())
    return {name: has == "1" for name, has in pairs}


def cuda_serves(capability: int) -> bool:
    """Whether the CUDA object has code for a GPU of this compute capability (10 * major + minor):
    machine code of its major version, not newer, or text that its driver translates."""
    for number, exact, text in re.findall(r"(\d+)([af]?)(\+PTX)?", cuda_targets):
        target = int(number)
        fits = capability == target if exact else capability // 10 == target // 10
        if (fits and target <= capability) or (text and not exact and target <= capability):
            return True
    return False


def last_build() -> dict[str, str | None]:
    """What the last build said: why it made no CPU kernels ("problem") or no CUDA object
    ("cuda_problem")."""
    said: dict[str, str | None] = json.loads((DIRECTORY / "build.json").read_text())
    return said


def _cannot_load_cuda() -> str | None:
    """Why there is nothing to load. Without torch's CUDA library the object cannot be opened."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if CUDA_OBJECT.exists():
        return None
    try:
        reason = last_build().get("cuda_problem")
    except (OSError, ValueError):
        reason = None
    return f"no CUDA kernels were built ({reason or f'{CUDA_OBJECT.name} is missing'})"


def _load(path: Path, question: str) -> tuple[str | None, str | None]:
    """Why it cannot be loaded, and else what its function `question` says."""
    try:
        torch.ops.load_library(str(path))
        return None, _message(path, question)
    except (OSError, AttributeError) as error:
        return f"{path.name} could not be loaded: {error}", None


def _message(path: Path, function: str) -> str | None:
    call = getattr(ctypes.CDLL(str(path)), function)
    call.restype = ctypes.c_char_p
    answer = call()
    return answer.decode() if answer else None


def _warn(message: str) -> None:
    warnings.warn(f"vqkernels: {message}", RuntimeWarning, stacklevel=3)
