"""The raw kernel tables of every instruction set, on NumPy arrays."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqkernels import native

METRICS = {"l2": 0, "dot": 1, "cosine": 2}
SCREENS = {"fp32": 0, "int8": 1}


def kernels_module() -> ModuleType | None:
    """The development module, or None where it was not built (as in a wheel)."""
    name = "vqkernels.lib._kernels"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def open_table(capability: str) -> Any:
    module = kernels_module()
    assert module is not None
    path = native.DIRECTORY / f"libvqkernels_cpu_{capability}{native.OPS_OBJECT.suffix}"
    return module.Table(str(path))


def as_array(tensor: Tensor) -> tuple[np.ndarray, str]:
    """The array a kernel takes, and its dtype's name; halves travel as their bits."""
    if tensor.dtype == torch.float32:
        return tensor.detach().numpy(), "float32"
    bits = tensor.detach().view(torch.int16).numpy().view(np.uint16)
    return bits, str(tensor.dtype).removeprefix("torch.")
