"""What a measurement needs to know of the machine: names, load, neighbours, memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEBIBYTE = 2**20
VERSIONED_PACKAGES = ("torch", "faiss-cpu", "vector-quantize-pytorch", "diffusers", "vqkernels")


def device_name() -> str:
    """The processor's model name and the machine's number of cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return f"{model}, {os.cpu_count()} cores"


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def file_stem(device: str) -> str:
    """A device name as a file name: `AMD EPYC, 2 cores` is `amd-epyc-2-cores`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def versions() -> str:
    """Versions of Python and of everything compared, as one `name version; ...` string."""
    parts = [f"python {platform.python_version()}"]
    for package in VERSIONED_PACKAGES:
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            version = getattr(sys.modules.get(package), "__version__", "absent")
            parts.append(f"{package} {version}")
    return "; ".join(parts)


def load_average() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


class Neighbours:
    """Cores kept busy by other processes (or stolen by the host) since it was made."""

    def __init__(self) -> None:
        self._start = self._sample()

    @staticmethod
    def _sample() -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
        machine = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), machine, own.ru_utime + own.ru_stime

    def cores_busy(self) -> float:
        now = self._sample()
        if self._start is None or now is None:
            return float("nan")
        begin, end = self._start, now
        wall, machine, own = (after - before for before, after in zip(begin, end, strict=True))
        return max(0.0, (machine - own) / wall) if wall > 0.0 else 0.0


def _memory_field(field: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
    return int(found.group(1)) / 1024 if found else None


def _return_free_memory() -> None:
    """Gives malloc's free pages back, so that reusing them counts as growth."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def with_peak_memory(call: Callable[[], Any]) -> tuple[Any, float]:
    """Runs `call` and returns its result with the MiB its peak stood above the start.

    The peak is the kernel's resident high-water mark, reset just before the call; the result
    itself is part of it. NaN where the system has no such counter.
    """
    _return_free_memory()
    before = _memory_field("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = None
    result = call()
    peak = _memory_field("VmHWM")
    if before is None or peak is None:
        return result, float("nan")
    return result, max(0.0, peak - before)


def pin(threads: int) -> None:
    """Keeps this process on the `threads` usable cores that are idlest now, where it can."""
    if hasattr(os, "sched_setaffinity"):
        before = _busy_ticks()
        time.sleep(0.1)
        busy = {core: ticks - before.get(core, 0) for core, ticks in _busy_ticks().items()}
        cores = sorted(os.sched_getaffinity(0), key=lambda core: (busy.get(core, 0), core))
        os.sched_setaffinity(0, set(cores[:threads]))


def _busy_ticks() -> dict[int, int]:
    stat = Path("/proc/stat")
    text = stat.read_text() if stat.exists() else ""
    found = re.findall(r"^cpu(\d+) (\d+) (\d+) (\d+)", text, re.MULTILINE)
    return {int(core): int(user) + int(nice) + int(system) for core, user, nice, system in found}


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a fresh process whose OpenMP, MKL and OpenBLAS pools have `threads`."""
    count = str(threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    # glibc's aligned allocations cut small pieces off; kept in its thread cache, these would keep
    # freed outputs from being used again, so that every other call clears fresh pages.
    tunables = os.environ.get("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    return {**os.environ, "GLIBC_TUNABLES": tunables, **dict.fromkeys(names, count)}
