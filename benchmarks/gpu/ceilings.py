"""A GPU's ceilings: matrix products and copies through torch, register loops through `rates.cu`."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks.ceilings import Ceiling

from .device import Call, Device

SOURCE = Path(__file__).with_name("rates.cu")
MATMUL_SIZE, DRY_MATMUL_SIZE = 8192, 64
COPY_BYTES, DRY_COPY_BYTES = 2**30, 2**20
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RATES = {
    "epilogue": (0, "subtraction + minimum", "float32", "scores/s"),
    "fma": (1, "registers", "float32", "FLOP/s"),
}


def copy(device: Device, repeats: int = 10) -> Ceiling:
    size = DRY_COPY_BYTES if device.dry else COPY_BYTES
    source = torch.ones(size // 4, device=device.kind)
    target = torch.empty_like(source)
    seconds = _seconds(device, lambda: target.copy_(source), repeats)
    shape = f"{2 * size // 2**20} MiB touched"
    return Ceiling("copy", shape, "float32", 2.0 * size / min(seconds), "B/s", seconds)


def matmul(device: Device, dtype: torch.dtype, repeats: int = 10) -> Ceiling:
    """A square product; fp32 without TF32 (`open_device` forbids it)."""
    size = DRY_MATMUL_SIZE if device.dry else MATMUL_SIZE
    a, b = (torch.randn(size, size, device=device.kind).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _seconds(device, lambda: torch.mm(a, b, out=out), repeats)
    name = str(dtype).removeprefix("torch.")
    return Ceiling("matmul", f"{size}^3", name, 2.0 * size**3 / min(seconds), "FLOP/s", seconds)


def mma_sync(dtype: torch.dtype) -> Ceiling:
    """The instruction of the CUDA search; RuntimeError without the CUDA object."""
    from vqkernels import cuda

    name = str(dtype).removeprefix("torch.")
    return Ceiling("mma.sync", "m16n8k16", name, cuda.tensor_core_peak(dtype=dtype), "FLOP/s", ())


def _seconds(device: Device, call: Call, repeats: int) -> tuple[float, ...]:
    for _ in range(3):
        call()
    return tuple(1e-3 * device.milliseconds(call) for _ in range(repeats))


def compile_rates(directory: Path, capability: str) -> tuple[Path | None, str]:
    """Builds rates.cu for `capability` ("90"); the library, or None and why there is none."""
    library = directory / f"rates_sm{capability}.so"
    if library.exists() and library.stat().st_mtime > SOURCE.stat().st_mtime:
        return library, ""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if nvcc is None:
        return None, "nvcc was not found"
    directory.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-O3", f"-arch=sm_{capability}", "-shared", "-Xcompiler", "-fPIC"]
    command += ["-cudart", "static", str(SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None, f"nvcc failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return library, ""


def register_rates(library: Path) -> tuple[dict[str, Ceiling], str]:
    """The ceilings of rates.cu by name, or none and why."""
    rate = ctypes.CDLL(str(library)).vqkernels_rate
    rate.restype, rate.argtypes = ctypes.c_double, [ctypes.c_int]
    found = {}
    for name, (kind, shape, dtype, unit) in RATES.items():
        value = rate(kind)
        if value <= 0:
            return {}, f"rates.cu: CUDA error {int(-value)}"
        found[name] = Ceiling(name, shape, dtype, value, unit, ())
    return found, ""
