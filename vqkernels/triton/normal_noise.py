"""Launch of `normal_noise`.

Floor: the bytes written. On an H100 (3.0 TB/s of copies, half of it writing) bf16 leaves about 40
instructions an element; a normal takes about 35.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch
from vqkernels.triton.noise_configs import block_and_warps, config_of
from vqkernels.triton.samples import block_of_program, drawn_block, has_halves, store_block


def normal_noise(
    shape: Sequence[int],
    key: Tensor,
    sample_ids: Tensor | None,
    dtype: torch.dtype,
    out: Sequence[Tensor] = (),
) -> Tensor:
    noise = out[0] if out else key.new_empty(shape, dtype=dtype)
    if noise.numel() == 0:
        return noise
    elements = math.prod(shape[1:])
    block, num_warps = block_and_warps(config_of("noise"), elements)
    launch(
        _normal_noise,
        shape[0] * triton.cdiv(elements, block),
        noise,
        key,
        sample_ids,
        elements,
        BLOCK=block,
        WIDE=has_halves(noise),
        num_warps=num_warps,
    )
    return noise


@triton.jit
def _normal_noise(noise, key, sample_ids, E, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """One program: a block of one sample."""
    b, start, lane, inside = block_of_program(E, BLOCK)
    z = drawn_block(key, sample_ids, b, start, tl.load(key + 1), BLOCK, WIDE)
    store_block(noise + b * E + start, lane, z, inside)
