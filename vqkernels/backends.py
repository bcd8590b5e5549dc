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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vqkernels import native, selection
from vqkernels.selection import GpuCall

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

# The kernels each op has beside its reference. Ops that are not here run on their reference.
KERNELS: dict[str, tuple[str, ...]] = {
    "nearest_code": ("cpu", "triton", "cuda"),
    "pack_codebook": ("cpu",),
    "gather_codes": ("cpu", "triton"),
    "code_statistics": ("cpu", "triton"),
    "quantize": ("cpu", "triton", "cuda"),
    "ema_update": ("cpu",),
    "timestep_embedding": ("cpu", "triton"),
    "ada_layer_norm": ("cpu", "triton", "cuda"),
    "gated_residual": ("cpu", "triton", "cuda"),
    "gated_residual_ada_layer_norm": ("cpu", "triton", "cuda"),
    "bias_gelu": ("cpu", "triton"),
    "qk_norm_rope": ("cpu", "triton"),
    "attention": ("cpu", "triton", "cuda"),
    "attention_qkvpacked": ("cpu", "triton"),
    "attention_varlen": ("cpu", "triton"),
    "normal_noise": ("cpu", "triton", "cuda"),
    "diffuse": ("cpu", "triton", "cuda"),
    "diffusion_loss": ("cpu", "triton"),
    "denoise_step": ("cpu", "triton", "cuda"),
    # Made of ops above, which choose for themselves.
    "modulated_attention": ("cpu", "triton"),
    "modulated_mlp": ("cpu", "triton"),
}

# Candidates in order of preference, best first, where `selection.TABLE` has no row.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
_OLDEST_CAPABILITY = 80
# Columns of q, k and v that the CUDA C++ attention is compiled for (csrc/cuda/attention.cu).
CUDA_ATTENTION_DIMS = (64, 72, 80, 96, 128)

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
# Arguments that say where rows are, whatever the dtype of the rows.
_PLACES = ("cu_seqlens_q", "cu_seqlens_k")
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_log = logging.getLogger("vqkernels")
_chosen: dict[tuple[str, str, str, tuple[torch.dtype, ...], GpuCall | None], str] = {}
_capabilities: dict[int | None, int] = {}
_logged: set[str] = set()


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
    gpu = _gpu_call(op, tensors) if device == "cuda" else None
    if torch.compiler.is_compiling():
        return _choose(_setting, op, device, dtypes, gpu)
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, tensors)
    key = (_setting, op, device, dtypes, gpu)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _choose(*key)
        _log_choice(chosen, *key)
    return chosen


def _gpu_call(op: str, tensors: Sequence[Tensor | None]) -> GpuCall | None:
    """The GPU of the first tensor and, where `selection` asks for it, the shapes."""
    for tensor in tensors:
        if tensor is not None:
            capability = _capability(tensor.device.index)
            if op == "attention" and len(tensors) > 2:
                q, _, v = tensors[:3]
                if q is not None and v is not None:
                    return GpuCall(capability, q.shape[-1], value_dim=v.shape[-1])
            if op not in selection.OPS or tensor.dim() == 0:
                return GpuCall(capability)
            dim = tensor.shape[-1]
            few_rows = tensor.numel() <= selection.FEW_ROWS * dim
            book = tensors[1] if len(tensors) > 1 and op in selection.SEARCHES else None
            codes = book.shape[-2] if book is not None and book.dim() > 1 else 0
            return GpuCall(capability, dim, few_rows, codes >= selection.LARGE_BOOK)
    return None


def _capability(index: int | None) -> int:
    known = _capabilities.get(index)
    if known is None:
        major, minor = torch.cuda.get_device_capability(index)
        known = _capabilities[index] = 10 * major + minor
    return known


# What torch.compiler.assume_constant_result sets; it would import torch._dynamo, for a second.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_tangents(op: str, tensors: tuple[Tensor | None, ...]) -> None:
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"vqkernels.{op}: forward-mode derivatives are not supported")


def why_not(
    backend: str,
    op: str,
    device: str,
    dtypes: tuple[torch.dtype, ...],
    gpu: GpuCall | None = None,
) -> str | None:
    """The first constraint that keeps `backend` from serving the call, or None."""
    if backend == "reference":
        return None
    if backend not in KERNELS.get(op, ()):
        return f"{op} has no {backend} kernel"
    if backend == "cpu" and native.problem is not None:
        return native.problem
    if backend == "triton" and not _TRITON_INSTALLED:
        return "triton is not installed"
    if backend == "cuda" and native.cuda_problem is not None:
        return native.cuda_problem
    wanted = "cpu" if backend == "cpu" else "cuda"
    if device != wanted:
        return f"its kernels need tensors on {wanted}, got {device}"
    if gpu is not None and gpu.capability < _OLDEST_CAPABILITY:
        return f"its kernels need compute capability 8.0 or newer, got {gpu.capability / 10}"
    if gpu is not None and backend == "cuda" and not native.cuda_serves(gpu.capability):
        return (
            f"its object was built for {native.cuda_targets}, which the GPU's compute capability "
            f"{gpu.capability / 10} does not run"
        )
    for dtype in dtypes:
        if dtype not in _KERNEL_DTYPES:
            return f"its kernels take float32, float16 and bfloat16, got {dtype}"
    if backend == "cuda" and op == "attention":
        return _why_no_cuda_attention(dtypes, gpu)
    return None


def _why_no_cuda_attention(dtypes: tuple[torch.dtype, ...], gpu: GpuCall | None) -> str | None:
    if torch.float32 in dtypes:
        return "its kernels take float16 and bfloat16, got torch.float32"
    if gpu is not None and not (gpu.dim == gpu.value_dim and gpu.dim in CUDA_ATTENTION_DIMS):
        dims = ", ".join(map(str, CUDA_ATTENTION_DIMS))
        return (
            f"its kernels take q, k and v of {dims} columns, got {gpu.dim} of q and "
            f"{gpu.value_dim} of v"
        )
    return None


def pass_over(backend: str, op: str, reason: str) -> str:
    """The reference, for a call that `backend` was chosen for and cannot serve; raises ValueError
    if it was asked for by name."""
    if _setting == backend:
        raise ValueError(f"backend {backend!r} cannot serve {op}: {reason}")
    return "reference"


def _candidates(
    op: str, device: str, dtypes: tuple[torch.dtype, ...], gpu: GpuCall | None
) -> tuple[str, ...]:
    """What the automatic choice would take, best first."""
    row = _row(op, dtypes, gpu)
    return PREFERENCE.get(device, ("reference",)) if row is None else row.order


def _row(op: str, dtypes: tuple[torch.dtype, ...], gpu: GpuCall | None) -> selection.Row | None:
    if gpu is None or op not in selection.OPS or gpu.capability < _OLDEST_CAPABILITY:
        return None
    return selection.preferred(gpu, dtypes, op)


def _choose(
    setting: str,
    op: str,
    device: str,
    dtypes: tuple[torch.dtype, ...],
    gpu: GpuCall | None = None,
) -> str:
    if setting != "auto":
        problem = why_not(setting, op, device, dtypes, gpu)
        if problem is not None:
            raise ValueError(f"backend {setting!r} cannot serve {op}: {problem}")
        return setting
    for backend in _candidates(op, device, dtypes, gpu):
        if why_not(backend, op, device, dtypes, gpu) is None:
            return backend
    return "reference"


def _log_choice(
    chosen: str,
    setting: str,
    op: str,
    device: str,
    dtypes: tuple[torch.dtype, ...],
    gpu: GpuCall | None,
) -> None:
    if setting == "auto":
        for backend in _candidates(op, device, dtypes, gpu):
            if backend == chosen:
                return
            if backend in KERNELS.get(op, ()):
                problem = why_not(backend, op, device, dtypes, gpu)
                message = f"{op} runs on {chosen}; {backend}: {problem}"
                if message not in _logged:
                    _logged.add(message)
                    _log.warning("%s", message)


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why each other one does not.

    Attributes:
        op: the op's name.
        backend: what serves the call; None if a backend asked for by name cannot.
        reasons: of each backend why it serves the call, or does not.
        passed_over: the backends that the automatic choice would rather have taken.
    """

    op: str
    backend: str | None
    reasons: dict[str, str]
    passed_over: tuple[str, ...] = ()

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
    values = (*args, *(value for name, value in kwargs.items() if name not in _PLACES))
    tensors = [value for value in values if isinstance(value, Tensor)]
    device = tensors[-1].device.type if tensors else "cpu"
    dtypes = tuple(tensor.dtype for tensor in tensors)
    gpu = _gpu_call(op, tensors) if device == "cuda" else None
    call = (op, device, dtypes, gpu)
    try:
        chosen = _choose(_setting, *call)
    except ValueError:
        chosen = None
    reasons = {
        backend: why_not(backend, *call) or "could serve the call" for backend in BACKENDS[1:]
    }
    passed_over: tuple[str, ...] = ()
    if chosen is not None and _setting == "auto":
        order = _candidates(*call)
        passed_over = order[: order.index(chosen)] if chosen in order else ()
        reasons[chosen] = "serves the call: automatic choice"
        row = _row(op, dtypes, gpu)
        if row is not None:
            kind = "measured" if row.measured else "an estimate"
            reasons[row.order[0]] += f"; preferred here: {row.reason} ({kind})"
    elif chosen is not None:
        reasons[chosen] = f"serves the call: asked for by name ({_setting})"
    return Explanation(op, chosen, reasons, passed_over)
