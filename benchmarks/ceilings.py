"""What the machine can do at best: multiply-adds, matrix products and copies a second."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("fma_rate.c")
FMA_SECONDS = 4e-3
MATMUL_SIZE = 2048
COPY_BYTES = 2**28
SMALLEST_COPY = 2**20


@dataclass(frozen=True)
class Ceiling:
    """`rate` operations (or bytes moved) a second: the best of `seconds`, one entry a run."""

    name: str
    shape: str
    dtype: str
    rate: float
    unit: str
    seconds: tuple[float, ...]


def compile_fma_loop(directory: Path) -> Path | None:
    """Builds fma_rate.c with the C compiler at hand; None where there is none or it fails."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    library = directory / "fma_rate.so"
    command = [compiler, "-O3", "-ffp-contract=fast", "-shared", "-fPIC", str(SOURCE)]
    result = subprocess.run([*command, "-o", str(library)], capture_output=True)
    return library if result.returncode == 0 else None


class FmaRate:
    """Fp32 operations a second on `threads` cores at once; `best` keeps the highest seen.

    A C loop of register-only multiply-adds when a library was compiled, else PyTorch's sgemm.
    """

    def __init__(self, library: Path | None, threads: int) -> None:
        self.source = "C loop" if library is not None else f"sgemm {MATMUL_SIZE}"
        self.best = 0.0
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._loop: Callable[[float], float] | None = None
        if library is not None:
            self._loop = ctypes.CDLL(str(library)).fma_rate
            self._loop.restype = ctypes.c_double
            self._loop.argtypes = [ctypes.c_double]
        self.measure()

    def measure(self) -> None:
        if self._loop is None:
            # The first measurement stands: a matrix product in every round would take seconds.
            rate = self.best or matmul(torch.float32).rate
        else:
            rate = sum(self._pool.map(self._loop, [FMA_SECONDS] * self._threads))
        self.best = max(self.best, rate)


def matmul(dtype: torch.dtype, repeats: int = 5) -> Ceiling:
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(2))
    out = torch.empty(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    seconds = _samples(lambda: torch.mm(a, b, out=out), repeats)
    rate = 2.0 * MATMUL_SIZE**3 / min(seconds)
    return Ceiling("matmul", f"{MATMUL_SIZE}^3", name, rate, "FLOP/s", seconds)


def copy(touched: int | None = None, repeats: int = 7) -> Ceiling:
    """Bytes read plus bytes written a second by a copy that touches `touched` bytes in all.

    The default is far larger than the caches. A row's floor uses its own number of bytes, since
    what fits in a cache moves faster.
    """
    touched = max(2 * COPY_BYTES if touched is None else touched, SMALLEST_COPY)
    source = torch.ones(touched // 8)
    target = torch.empty_like(source)
    inner = max(1, COPY_BYTES // (8 * touched))

    def copies() -> None:
        for _ in range(inner):
            target.copy_(source)

    seconds = tuple(total / inner for total in _samples(copies, repeats))
    rate = 2.0 * 4 * source.numel() / min(seconds)
    return Ceiling("copy", f"{touched // 2**20} MiB touched", "float32", rate, "B/s", seconds)


def fma(rate: FmaRate, repeats: int = 10) -> Ceiling:
    for _ in range(repeats):
        rate.measure()
    shape = rate.source
    return Ceiling("fma", shape, "float32", rate.best, "FLOP/s", (FMA_SECONDS,) * repeats)


def _samples(call: Callable[[], object], repeats: int) -> tuple[float, ...]:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return tuple(seconds)
