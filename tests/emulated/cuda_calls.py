"""The emulated CUDA launchers on torch tensors of the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_METRICS = {"l2": 0, "dot": 1, "cosine": 2}
_GRADIENTS = {"straight_through": 0, "rotation": 1, "none": 2}


@dataclass(frozen=True)
class Device:
    """A GPU as launchers see it: what they choose depends on it."""

    capability: int = 90
    multiprocessors: int = 1
    shared_block: int = 227 << 10
    shared_total: int = 228 << 10


HOPPER = Device()
SMALL = Device(capability=89, shared_block=99 << 10, shared_total=100 << 10)  # two stages


@dataclass(frozen=True)
class Case:
    """`run` calls kernels and raises AssertionError where they are wrong."""

    name: str
    run: Callable[[CudaCalls], None]
    device: Device = HOPPER

    def __str__(self) -> str:
        return self.name


class CudaCalls:
    """The launchers of one emulated library. `declare(tensor, initialized)` names memory that
    kernels may touch; a launch that reports a fault raises RuntimeError."""

    def __init__(self, library: ctypes.CDLL, declare, device: Device = HOPPER) -> None:
        self.library = library
        self.declare = declare
        self.device = device

    @property
    def scratch_bytes(self) -> int:
        """What the last launch allocated beside its results."""
        function = self.library.emulated_scratch_bytes
        function.restype = ctypes.c_int64
        return int(function())

    def nearest_code(
        self,
        x: Tensor,
        codebook: Tensor,
        metric: str = "l2",
        splits: int = 0,
        weighed: Tensor | None = None,
        warpgroups: int = 0,
    ) -> Tensor:
        """`weighed`: int32, one a row, gets how many codes were compared in float64; `warpgroups`:
        1 for mma.sync, 2 for wgmma."""
        indices = torch.full(x.shape[:-1], -7, dtype=torch.int64)
        self.declare_all([x, codebook], [indices, *([] if weighed is None else [weighed])])
        grouped = codebook.dim() == 3
        self.run(
            self.library.emulated_nearest_code,
            _rows(x, grouped),
            _codes(codebook),
            _METRICS[metric],
            _labels(x, grouped),
            pointer(indices),
            pointer(weighed),
            splits,
            warpgroups,
        )
        return indices

    def quantize(
        self, x: Tensor, codebook: Tensor, metric: str = "l2", mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        indices = torch.full(x.shape[:-1], -7, dtype=torch.int64)
        quantized = torch.empty_like(x).fill_(7)
        counts = torch.full(codebook.shape[:-1], -7.0)
        losses = torch.full((2,), -7.0)
        if mask is not None:
            mask = mask.to(torch.uint8)
        given = [x, codebook, *([] if mask is None else [mask])]
        self.declare_all(given, [indices, quantized, counts, losses])
        grouped = codebook.dim() == 3
        self.run(
            self.library.emulated_quantize,
            _rows(x, grouped),
            _codes(codebook),
            _METRICS[metric],
            _labels(x, grouped),
            pointer(indices),
            pointer(mask),
            _rows(quantized, grouped),
            pointer(counts),
            pointer(losses),
        )
        return quantized, indices, losses[0], losses[1], counts

    def quantize_backward_x(
        self,
        grad_quantized: Tensor | None,
        grad_commitment: Tensor | None,
        x: Tensor,
        codebook: Tensor,
        indices: Tensor,
        gradient: str,
    ) -> Tensor:
        grad_x = torch.empty_like(x).fill_(7)
        given = [x, codebook, indices, grad_quantized, grad_commitment]
        self.declare_all([tensor for tensor in given if tensor is not None], [grad_x])
        grouped = codebook.dim() == 3
        self.run(
            self.library.emulated_quantize_backward_x,
            _rows(x, grouped),
            _codes(codebook),
            _labels(x, grouped),
            pointer(indices),
            _GRADIENTS[gradient],
            None if grad_quantized is None else _rows(grad_quantized, grouped),
            pointer(grad_commitment),
            _rows(grad_x, grouped),
        )
        return grad_x

    def quantize_backward_codebook(
        self, grad_codebook_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor
    ) -> Tensor:
        grouped = codebook.dim() == 3
        keys = torch.full((indices.numel(),), -7, dtype=torch.int32)
        self.declare_all([indices], [keys])
        self.run(
            self.library.emulated_code_keys,
            _rows(x, grouped),
            _labels(x, grouped),
            pointer(indices),
            ctypes.c_int64(codebook.shape[-2]),
            pointer(keys),
        )
        keys, order = torch.sort(keys, stable=True)
        grad = torch.full(codebook.shape, 7.0, dtype=codebook.dtype)
        self.declare_all([grad_codebook_loss, x, codebook, keys, order], [grad])
        self.run(
            self.library.emulated_quantize_backward_codebook,
            _rows(x, grouped),
            _codes(codebook),
            pointer(grad_codebook_loss),
            pointer(keys),
            pointer(order),
            _codes(grad),
        )
        return grad

    def tensor_core_peak(self, dtype: torch.dtype, repeats: int) -> tuple[Tensor, int]:
        """What the measuring kernel leaves in its sink, and the multiply-adds it ran."""
        sink = torch.full((256 * self.device.multiprocessors,), torch.nan)
        products = ctypes.c_int64(0)
        self.declare_all([], [sink])
        self.run(
            self.library.emulated_tensor_core_peak,
            DTYPES[dtype],
            repeats,
            pointer(sink),
            ctypes.byref(products),
        )
        return sink, products.value

    def declare_all(self, given: list[Tensor], written: list[Tensor]) -> None:
        for tensor in given:
            self.declare(tensor, True)
        for tensor in written:
            self.declare(tensor, False)

    def run(self, function, *args) -> None:
        device = (ctypes.c_int64 * 4)(
            self.device.capability,
            self.device.multiprocessors,
            self.device.shared_block,
            self.device.shared_total,
        )
        function.restype = ctypes.c_char_p
        problem = function(device, *args)
        if problem is not None:
            raise RuntimeError(problem.decode())


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _grid(tensor: Tensor, grouped: bool) -> tuple[list[int], list[int]]:
    """Sizes and strides of at most three row dimensions of `[..., N, D]` or `[..., G, N, D]`; one
    level where rows lie evenly, as the ops layer merges them."""
    dims = [d for d in range(tensor.dim() - 1) if not (grouped and d == tensor.dim() - 3)]
    sizes, strides = [tensor.shape[d] for d in dims], [tensor.stride(d) for d in dims]
    if all(strides[i] == sizes[i + 1] * strides[i + 1] for i in range(len(dims) - 1)):
        total = 1
        for size in sizes:
            total *= size
        sizes, strides = [total], strides[-1:]
    assert len(sizes) <= 3
    fill = 3 - len(sizes)
    return sizes + [1] * fill, strides + [0] * fill


def _rows(tensor: Tensor, grouped: bool) -> ctypes.Array:
    sizes, strides = _grid(tensor, grouped)
    return (ctypes.c_int64 * 12)(
        tensor.data_ptr(),
        DTYPES[tensor.dtype],
        tensor.shape[-3] if grouped else 1,
        sizes[0] * sizes[1] * sizes[2],
        tensor.shape[-1],
        sizes[1],
        sizes[2],
        *strides,
        tensor.stride(-3) if grouped else 0,
        tensor.stride(-1),
    )


def _codes(codebook: Tensor) -> ctypes.Array:
    books = codebook if codebook.dim() == 3 else codebook[None]
    stride = books.stride()
    return (ctypes.c_int64 * 12)(
        books.data_ptr(), DTYPES[books.dtype], *books.shape, 1, 1, stride[1], 0, 0, stride[0],
        stride[2],
    )  # fmt: skip


def _labels(x: Tensor, grouped: bool) -> ctypes.Array:
    """Places of a contiguous tensor of labels, on the row grid of x."""
    shape = x.shape[:-1]
    strides = torch.empty(shape, device="meta").stride()
    dims = [d for d in range(len(shape)) if not (grouped and d == len(shape) - 2)]
    sizes, _ = _grid(x, grouped)
    of_rows = [strides[d] for d in dims]
    if sizes[1] == sizes[2] == 1:
        of_rows = of_rows[-1:]
        assert not grouped or len(dims) == 1, "labels of several books do not merge"
    of_rows += [0] * (3 - len(of_rows))
    return (ctypes.c_int64 * 4)(*of_rows, strides[len(shape) - 2] if grouped else 0)
