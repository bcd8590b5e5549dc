"""Attention's kernels compiled for GPUs that are not here: for sequences of varying length, without
and with dropout, and with masks."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from resource_table import MULTIPROCESSORS
from targets import CAPABILITIES, Compiled, Launch, compiled, recorded

from vqkernels.selection import family
from vqkernels.triton import (
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
)

# The words of dropout do not fit beside two sums within 255 registers.
SPILLS = ((120, "_attention_grad_keys"),)
KERNELS = ("_attention_forward", "_attention_grad_queries", "_attention_grad_keys")


HALF, SPLIT = torch.bfloat16, torch.float32
# The last width of a row of the table needs the most. Of masks a tile of added numbers does.
MASKED = [(capability, dim, "added", HALF) for capability in CAPABILITIES for dim in (80, 128, 256)]
MASKED += [(90, 96, "added", HALF), (120, 256, "added", SPLIT)]
MASKED += [(90, dim, mask, HALF) for dim in (80, 128) for mask in ("none", "bool")]
DROPPED = [(90, dim, "none", HALF) for dim in (80, 96, 128, 256)]
DROPPED += [(90, 128, "added", HALF), (120, 256, "none", SPLIT)]
DROPPED += [(capability, 256, "added", HALF) for capability in CAPABILITIES]
TILES = [(*case, False) for case in MASKED] + [(*case, True) for case in DROPPED]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_for(capability: int, is_causal: bool, dropout: bool) -> dict[str, Compiled]:
    """The kernels over views of a packed qkv, 64 columns in bf16."""
    q, k, v = empty(5000, 3, 16, 64).unbind(1)
    out, lse = empty(5000, 16, 64), empty(16, 5000, dtype=torch.float32)
    starts = empty(33, dtype=torch.int32)
    more = (starts, starts, 300, 300, is_causal, 0.125)
    if dropout:
        more += (0.1, empty(dtype=torch.int64))
    launches = recorded(lambda: attention_varlen(q, k, v, *more), capability)
    backward = lambda: attention_varlen_backward(out, q, k, v, out, lse, *more)  # noqa: E731
    launches += recorded(backward, capability)
    return all_compiled(launches, capability)


def all_compiled(launches: list[Launch], capability: int) -> dict[str, Compiled]:
    return {
        launch.kernel.__name__: compiled(launch, capability)
        for launch in launches
        if launch.kernel.__name__ in KERNELS
    }


@pytest.mark.parametrize(("is_causal", "dropout"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability: int, is_causal: bool, dropout: bool) -> None:
    names = {"hopper": "wgmma.mma_async", "blackwell": "tcgen05.mma"}
    results = compile_for(capability, is_causal, dropout)
    assert set(results) == set(KERNELS)
    for kernel, result in results.items():
        assert result.tensor_instruction == names.get(family(capability), "mma.sync"), kernel
        assert "tf32" not in result.ptx
        if dropout and (capability, kernel) in SPILLS:
            continue
        assert not any(loop["LDL"] + loop["STL"] for loop in result.code.innermost_loops), kernel


@pytest.mark.parametrize(("capability", "dim", "mask", "dtype", "dropout"), TILES)
def test_shared_memory_holds_masks_and_dropout(
    capability: int, dim: int, mask: str, dtype: torch.dtype, dropout: bool
) -> None:
    """As the wrappers launch them: what needs more raises as it starts."""
    q, k = (empty(2, 2, rows, dim, dtype=dtype) for rows in (150, 190))
    lse = empty(2, 2, 150, dtype=torch.float32)
    of_mask = torch.bool if mask == "bool" else dtype
    given = None if mask == "none" else empty(150, 190, dtype=of_mask).expand(2, 2, -1, -1)
    more = (given, False, 0.125, *((0.1, empty(dtype=torch.int64)) if dropout else ()))
    launches = recorded(lambda: attention(q, k, k, *more), capability)
    backward = lambda: attention_backward(q, q, k, k, q, lse, *more)  # noqa: E731
    results = all_compiled(launches + recorded(backward, capability), capability)
    assert set(results) == set(KERNELS)
    for kernel, result in results.items():
        assert result.shared <= MULTIPROCESSORS[capability].shared_block, kernel
