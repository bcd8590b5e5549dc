"""The GPU as a stopwatch and a memory gauge, and the CPU that stands in for it in a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

import vqkernels
from benchmarks import machine
from vqkernels.backends import select

Call = Callable[[], Any]

# More than any L2: H100 and H200 50 MB, B200 126 MB.
FLUSH_BYTES = 2**28
WARM_UP_CALLS = 3


class Device(Protocol):
    """`kind` is the tensors' device type; times are milliseconds, memory is MiB."""

    kind: str
    dry: bool

    def name(self) -> str: ...

    def synchronize(self) -> None: ...

    def flush(self) -> None:
        """Leave nothing of use in the caches."""

    def milliseconds(self, call: Call) -> float: ...

    def with_peak_memory(self, call: Call) -> tuple[Any, float]:
        """The call's result and by how much its peak stood above the start, result included."""

    def repeated(self, call: Call, times: int) -> Call:
        """`times` calls as one, without the host's share where the device can replay them."""


class Cuda:
    kind = "cuda"
    dry = False

    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        self._flushed.zero_()

    def milliseconds(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def with_peak_memory(self, call: Call) -> tuple[Any, float]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / machine.MEBIBYTE

    def repeated(self, call: Call, times: int) -> Call:
        """A CUDA graph. Raises RuntimeError for a call that cannot be captured."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay


class StandIn:
    """The CPU in the GPU's place: the same code runs, and its times mean nothing."""

    kind = "cpu"
    dry = True

    def name(self) -> str:
        return "dry run"

    def synchronize(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def milliseconds(self, call: Call) -> float:
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)

    def with_peak_memory(self, call: Call) -> tuple[Any, float]:
        return machine.with_peak_memory(call)

    def repeated(self, call: Call, times: int) -> Call:
        def calls() -> None:
            for _ in range(times):
                call()

        return calls


def open_device(dry: bool) -> Device:
    """The GPU, or its stand-in.

    Raises:
        RuntimeError: there is no GPU that torch can use.
    """
    if dry:
        return StandIn()
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return Cuda()


def our_backends(dry: bool) -> list[str]:
    """The kernels of ours that serve `nearest_code` on this device."""
    names = ("cpu", "reference") if dry else ("cuda", "triton")
    return [name for name in names if not refusal(name, "cpu" if dry else "cuda")]


def refusal(backend: str, kind: str) -> str:
    """Why a backend cannot serve `nearest_code` on a device, or ""."""
    x = torch.empty(1, 16, device=kind)
    try:
        with vqkernels.use_backend(backend):
            select("nearest_code", x, x)
    except ValueError as error:
        return str(error)
    return ""
