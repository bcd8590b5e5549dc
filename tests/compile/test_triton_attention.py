"""Attention's kernels for sequences of varying length, without and with dropout, compiled for GPUs
that are not here."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from targets import CAPABILITIES, Compiled, compiled, recorded

from vqkernels.selection import family
from vqkernels.triton import attention_varlen, attention_varlen_backward

# The words of dropout do not fit beside two sums within 255 registers.
SPILLS = ((120, "_attention_grad_keys"),)
KERNELS = ("_attention_forward", "_attention_grad_queries", "_attention_grad_keys")


def compile_for(capability: int, is_causal: bool, dropout: bool) -> dict[str, Compiled]:
    """The kernels over views of a packed qkv, 64 columns in bf16."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = empty(5000, 3, 16, 64).unbind(1)
    out, lse = empty(5000, 16, 64), empty(16, 5000, dtype=torch.float32)
    starts = empty(33, dtype=torch.int32)
    more = (starts, starts, 300, 300, is_causal, 0.125)
    if dropout:
        more += (0.1, empty(dtype=torch.int64))
    launches = recorded(lambda: attention_varlen(q, k, v, *more), capability)
    backward = lambda: attention_varlen_backward(out, q, k, v, out, lse, *more)  # noqa: E731
    launches += recorded(backward, capability)
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
