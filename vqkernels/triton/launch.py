"""The one door through which kernels start, and what a launch needs to know of the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceFacts:
    """Compute capability as 10 * major + minor, and the number of multiprocessors."""

    capability: int
    multiprocessors: int


# What Triton's interpreter stands for when the tensors are on the CPU.
_INTERPRETED = DeviceFacts(capability=80, multiprocessors=4)


def device_facts(device: torch.device) -> DeviceFacts:
    return _cuda_facts(device) if device.type == "cuda" else _INTERPRETED


@functools.cache
def _cuda_facts(device: torch.device) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(device)
    return DeviceFacts(10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(kernel: Any, programs: int, *args: Any, **meta: Any) -> None:
    """Start `programs` programs of `kernel` on the device of its first argument, a tensor."""
    if programs >= 1 << 31:
        raise ValueError(f"x needs {programs} programs of one kernel; a launch holds 2^31 - 1")
    # What is to be fused is written as tl.fma; Triton's versions differ in what else they fuse.
    meta["enable_fp_fusion"] = False
    if programs > 0:
        _start(kernel, programs, args, meta)


def _start(kernel: Any, programs: int, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    first: Tensor = args[0]
    if first.is_cuda:
        with torch.cuda.device(first.device):
            kernel[(programs,)](*args, **meta)
    else:
        kernel[(programs,)](*args, **meta)
