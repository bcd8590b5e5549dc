"""Which kernel serves a call: one ladder of predicates that can say why not.

`select` is called by every public function with the op's tensors. A backend asked for by name
(`use_backend`, or `VQKERNELS_BACKEND` for the whole process) must serve the call or raises; the
automatic choice takes the first of the device's candidates that can, and logs once why it had to
pass one over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vqkernels import native

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

# The kernels each op has beside its reference. Ops that are not here run on their reference.
KERNELS: dict[str, tuple[str, ...]] = {
    "nearest_code": ("cpu", "triton"),
    "pack_codebook": ("cpu",),
    "gather_codes": ("cpu", "triton"),
    "code_statistics": ("cpu", "triton"),
    "quantize": ("cpu", "triton"),
    "ema_update": ("cpu",),
    "timestep_embedding": ("cpu",),
}

# Candidates in order of preference, best first. GPU: an estimate until measured on a GPU.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_log = logging.getLogger("vqkernels")
_chosen: dict[tuple[str, str, str, tuple[torch.dtype, ...]], str] = {}


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        options = ", ".join(BACKENDS)
        raise ValueError(f"{source} must be one of {options}, got {name!r}")
    return name


_setting = _checked(os.environ.get("VQKERNELS_BACKEND") or "auto", "VQKERNELS_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every vqkernels op in this block by one backend: "reference", "cpu", "triton", "cuda",
    or "auto" for the automatic choice. The setting is the process's, not the thread's.

    Raises:
        ValueError: an unknown name; and, from the ops in the block, a call that this backend
            cannot serve, with the constraint that failed.
    """
    global _setting
    before, _setting = _setting, _checked(name, "backend")
    try:
        yield
    finally:
        _setting = before


def select(op: str, *tensors: Tensor | None) -> str:
    """The backend that serves `op` on these tensors; raises ValueError if a named one cannot."""
    device = "cpu"
    dtypes: tuple[torch.dtype, ...] = ()
    for tensor in tensors:
        if tensor is not None:
            device = tensor.device.type
            dtypes += (tensor.dtype,)
    if torch.compiler.is_compiling():
        return _choose(_setting, op, device, dtypes)
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, tensors)
    key = (_setting, op, device, dtypes)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _choose(*key)
        _log_choice(chosen, *key)
    return chosen


def _refuse_tangents(op: str, tensors: tuple[Tensor | None, ...]) -> None:
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"vqkernels.{op}: forward-mode derivatives are not supported")


def why_not(backend: str, op: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The first constraint that keeps `backend` from serving the call, or None."""
    if backend == "reference":
        return None
    if backend not in KERNELS.get(op, ()):
        return f"{op} has no {backend} kernel"
    if backend == "cpu" and native.problem is not None:
        return native.problem
    if backend == "triton" and not _TRITON_INSTALLED:
        return "triton is not installed"
    wanted = "cpu" if backend == "cpu" else "cuda"
    if device != wanted:
        return f"its kernels need tensors on {wanted}, got {device}"
    for dtype in dtypes:
        if dtype not in _KERNEL_DTYPES:
            return f"its kernels take float32, float16 and bfloat16, got {dtype}"
    return None


def _choose(setting: str, op: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    if setting != "auto":
        problem = why_not(setting, op, device, dtypes)
        if problem is not None:
            raise ValueError(f"backend {setting!r} cannot serve {op}: {problem}")
        return setting
    for backend in PREFERENCE.get(device, ("reference",)):
        if why_not(backend, op, device, dtypes) is None:
            return backend
    return "reference"


def _log_choice(
    chosen: str, setting: str, op: str, device: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    if setting == "auto":
        for backend in PREFERENCE.get(device, ()):
            if backend == chosen:
                return
            if backend in KERNELS.get(op, ()):
                problem = why_not(backend, op, device, dtypes)
                _log.warning("%s runs on %s; %s: %s", op, chosen, backend, problem)


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why each other one does not."""

    op: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend can serve this call'}"]
        lines += [f"  {backend:<10} {reason}" for backend, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(op: str, *args: object, **kwargs: object) -> Explanation:
    """Which backend would serve `op(*args, **kwargs)`, and why not the others.

    Args:
        op: the op's name, such as "nearest_code".
        args, kwargs: the call's arguments; only the tensors among them matter.

    >>> x, codebook = torch.randn(8, 4), torch.randn(16, 4)
    >>> explain("nearest_code", x, codebook).backend in ("cpu", "reference")
    True
    """
    from vqkernels import ops

    if not hasattr(ops, op):
        raise ValueError(f"op must be the name of a vqkernels op, got {op!r}")
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    device = tensors[-1].device.type if tensors else "cpu"
    dtypes = tuple(tensor.dtype for tensor in tensors)
    try:
        chosen = _choose(_setting, op, device, dtypes)
    except ValueError:
        chosen = None
    reasons = {}
    for backend in BACKENDS[1:]:
        if backend == chosen:
            asked = "automatic choice" if _setting == "auto" else f"asked for by name ({_setting})"
            reasons[backend] = f"serves the call: {asked}"
        else:
            reasons[backend] = why_not(backend, op, device, dtypes) or "could serve the call"
    return Explanation(op, chosen, reasons)
