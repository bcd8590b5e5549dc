"""Which GPU backend to prefer, as data.

`preferred` returns the first row of `TABLE` that fits the op, the GPU, the dtypes and the shape. A
row that was not measured is an estimate and says what it follows from. `use_backend` chooses any
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

# By tensor-core instructions and shared memory: 8.0; 8.6, 8.9 and 12.x; 9.0; 10.x and 11.x.
FAMILIES = ("ampere", "small", "hopper", "blackwell")
SEARCHES = ("nearest_code", "quantize")
OPS = (*SEARCHES, "ada_layer_norm", "gated_residual_ada_layer_norm")
FEW_ROWS = 1024
LARGE_BOOK = 8192  # codes
_HALVES = (torch.float16, torch.bfloat16)


class GpuCall(NamedTuple):
    """What of a call on a GPU matters: the compute capability as 10 * major + minor, D, whether x
    has at most `FEW_ROWS` rows, and whether a book has at least `LARGE_BOOK` codes. Of attention D
    is d, and `value_dim` e."""

    capability: int
    dim: int = 0
    few_rows: bool = False
    large_book: bool = False
    value_dim: int = 0


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        families: the GPU families it is for.
        dtypes: "half" where all tensors are half precision, "float32" for the rest, "any" for both.
        dims: the least and the most D, 0 for no limit.
        few_rows: whether it is for calls of at most `FEW_ROWS` rows alone.
        order: backends, best first.
        reason: why this order.
        large_book: whether it is for books of at least `LARGE_BOOK` codes alone.
        measured: whether the reason is a measurement on such a GPU.
        ops: the ops it is for.
    """

    families: tuple[str, ...]
    dtypes: str
    dims: tuple[int, int]
    few_rows: bool
    order: tuple[str, ...]
    reason: str
    large_book: bool = False
    measured: bool = False
    ops: tuple[str, ...] = SEARCHES


_CUDA_FIRST = ("cuda", "triton", "reference")
_TRITON_FIRST = ("triton", "cuda", "reference")

# fmt: off
TABLE = (
    Row(FAMILIES, "any", (1, 0), True, _CUDA_FIRST,
        "few rows take less time than Triton's launcher, in Python, takes to start its kernels"),
    Row(("hopper",), "half", (1, 16), False, _TRITON_FIRST,
        "H100, 65536 x 8, K = 16384, fp16: 0.36 ms; the CUDA search, which makes forms of three "
        "products, took 0.47 for fp32 and no less for halves", measured=True),
    Row(FAMILIES, "any", (1, 16), False, _CUDA_FIRST,
        "up to D = 16 three fp16 products fit into one or a few tensor-core steps; Triton "
        "multiplies in fp32 lanes there"),
    Row(("hopper",), "half", (129, 256), False, _CUDA_FIRST,
        "H100, 65536 x 256, K = 16384, fp16: 0.96 ms against Triton's 1.22",
        large_book=True, measured=True),
    Row(("hopper",), "half", (64, 0), False, _TRITON_FIRST,
        "H100, 65536 rows, fp16: 0.031 ms against CUDA's 0.061 at D = 64, K = 1024, level at K = "
        "16384; 0.098 against 0.131 at D = 256, K = 1024", measured=True),
    Row(("blackwell",), "half", (64, 0), False, _TRITON_FIRST,
        "Triton emits tcgen05, which multiplies faster than the mma.sync of the CUDA kernels"),
    Row(("hopper",), "float32", (17, 0), False, _CUDA_FIRST,
        "H100, 65536 x 256: 0.26 ms against Triton's 0.37 at K = 1024, 1.5 against 5.0 at 16384",
        measured=True),
    Row(FAMILIES, "half", (17, 0), False, _CUDA_FIRST,
        "both multiply by mma.sync, or D is too small for products to be the limit; the CUDA "
        "kernels spend fewer instructions a score on the minimum"),
    Row(FAMILIES, "float32", (17, 0), False, _CUDA_FIRST,
        "one fp16 product a score and float64 for what its bound leaves open; Triton takes "
        "several bf16 products a score"),
    # In a graph. Widths of the blocks in which Triton reads measured ones, and between them.
    Row(("hopper",), "half", (257, 4096), False, _CUDA_FIRST,
        "H100, 32768 rows, bf16, forward + backward: 0.022 + 0.042 ms against Triton's 0.029 + "
        "0.049 at D = 384, 0.060 + 0.104 against 0.090 + 0.171 at 1152, 0.160 + 0.242 against "
        "0.143 + 0.372 at 3072", measured=True, ops=("ada_layer_norm",)),
    Row(("hopper",), "half", (257, 4096), False, _CUDA_FIRST,
        "H100, 32768 rows, bf16, forward + backward: 0.043 + 0.065 ms against Triton's 0.050 + "
        "0.081 at D = 384, 0.112 + 0.182 against 0.108 + 0.234 at 1152, 0.299 + 0.470 against "
        "0.273 + 0.766 at 3072", measured=True, ops=("gated_residual_ada_layer_norm",)),
    Row(("hopper",), "float32", (1025, 2048), False, _CUDA_FIRST,
        "H100, 16384 x 1152, forward + backward: 0.063 + 0.092 ms against Triton's 0.063 + 0.100",
        measured=True, ops=("ada_layer_norm",)),
    Row(("hopper",), "float32", (1025, 2048), False, _TRITON_FIRST,
        "H100, 16384 x 1152, forward + backward: 0.104 + 0.172 ms against CUDA's 0.118 + 0.178",
        measured=True, ops=("gated_residual_ada_layer_norm",)),
)
# fmt: on


def family(capability: int) -> str:
    if capability < 80:
        raise ValueError(f"compute capability must be 8.0 or newer, got {capability / 10}")
    if capability < 90:
        return "ampere" if capability == 80 else "small"
    if capability < 100:
        return "hopper"
    return "blackwell" if capability < 120 else "small"


def preferred(call: GpuCall, dtypes: tuple[torch.dtype, ...], op: str = SEARCHES[0]) -> Row | None:
    """The first row that fits the call; every search has one."""
    kind = "half" if all(dtype in _HALVES for dtype in dtypes) else "float32"
    for row in TABLE:
        least, most = row.dims
        if (
            op in row.ops
            and family(call.capability) in row.families
            and row.dtypes in (kind, "any")
            and least <= max(call.dim, 1)
            and (most == 0 or call.dim <= most)
            and (call.few_rows or not row.few_rows)
            and (call.large_book or not row.large_book)
        ):
            return row
    return None
