"""CUDA C++ launches with explicit choices, and the ceiling that they work against.

For measurements: `vqkernels.nearest_code` makes these choices itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import native
from vqkernels.ops._checks import METRICS, check_choice, check_rows

_OPS = torch.library.Library("vqkernels_cuda", "FRAGMENT")
_OPS.define(
    "nearest_code_as(Tensor x, Tensor codebook, str metric, int splits, int block_rows, int stages,"
    " int warpgroups) -> Tensor"
)
_OPS.define("tensor_core_peak(Tensor like, int repeats) -> int")


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    splits: int = 0,
    block_rows: int = 0,
    stages: int = 0,
    warpgroups: bool | None = None,
) -> Tensor:
    """`vqkernels.nearest_code` on the CUDA C++ kernels, launched as asked; the same indices.

    Args:
        x, codebook, metric: as there; on a CUDA device, float32, float16 or bfloat16.
        splits: parts that K is searched in, side by side; 0 for as many as fill the device.
        block_rows: rows a block, 128 or 256, of the search by mma.sync; 0 for the launcher's
            choice.
        stages: chunks of codes on their way in it, 2 or 3; 0 for the launcher's choice.
        warpgroups: whether to multiply by wgmma (compute capability 9.0, D to 256) or by mma.sync;
            None for the launcher's choice.

    Raises:
        RuntimeError: no CUDA object; a launch that the device has no room for, or no warpgroups.
        TypeError, ValueError: as `vqkernels.nearest_code`, and for another `block_rows`, `stages`.
    """
    check_rows("x", x, codebook)
    check_choice("metric", metric, METRICS)
    if splits < 0:
        raise ValueError(f"splits must be 0 or more, got {splits}")
    for name, value, accepted in (
        ("block_rows", block_rows, (0, 128, 256)),
        ("stages", stages, (0, 2, 3)),
    ):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {accepted}, got {value}")
    _check_object()
    op = torch.ops.vqkernels_cuda.nearest_code_as
    products = {None: 0, False: 1, True: 2}[warpgroups]
    result: Tensor = op(x, codebook, metric, splits, block_rows, stages, products)
    return result


def tensor_core_peak(
    device: torch.device | str = "cuda", dtype: torch.dtype = torch.float16
) -> float:
    """Operations a second (two a multiply-add) of the instruction that the search is made of,
    mma.sync m16n8k16 with fp32 sums, from registers: the best of ten launches of about 10 ms.

    Args:
        device: a CUDA device.
        dtype: torch.float16 or torch.bfloat16.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
    _check_object()
    like = torch.empty(1, device=device, dtype=dtype)
    op = torch.ops.vqkernels_cuda.tensor_core_peak
    best = 0.0
    with torch.cuda.device(like.device):
        op(like, 1 << 15)
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            products = op(like, 1 << 16)
            end.record()
            end.synchronize()
            best = max(best, 2e3 * products / start.elapsed_time(end))
    return best


def _check_object() -> None:
    if native.cuda_problem is not None:
        raise RuntimeError(f"no CUDA kernels: {native.cuda_problem}")
