"""Launch of `diffuse`.

Floor, bytes an element, s the size of x0: 3 s where the noise is drawn, and the noise's own where
it is given. On an H100 (3.0 TB/s of copies) bf16 leaves about 58 instructions an element.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.launch import launch
from vqkernels.triton.noise_configs import block_and_warps, config_of
from vqkernels.triton.samples import (
    block_of_program,
    has_halves,
    levels_of,
    load_block,
    load_level,
    noise_block,
    place_of_level,
    samples_of,
    store_block,
)


def diffuse(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    target: str,
    out: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    x_t, of_target = out if out else (x0.new_empty(x0.shape), x0.new_empty(x0.shape))
    if x0.numel() == 0:
        return x_t, of_target
    data, given = samples_of(x0), samples_of(noise)
    levels = levels_of(x0, alpha)
    elements = levels.each * levels.size
    block, num_warps = block_and_warps(config_of("diffuse"), elements)
    launch(
        _diffuse,
        x0.shape[0] * triton.cdiv(elements, block),
        data.tensor,
        data.stride,
        alpha,
        sigma,
        given.tensor,
        given.stride,
        key,
        sample_ids,
        x_t,
        of_target,
        elements,
        tuple(levels),
        TARGET=target,
        SEVERAL=levels.each > 1,
        BLOCK=block,
        WIDE=has_halves(x0, noise),
        num_warps=num_warps,
    )
    return x_t, of_target


@triton.jit
def _diffuse(
    x0,
    x0_stride,
    alpha,
    sigma,
    noise,
    noise_stride,
    key,
    sample_ids,
    x_t,
    target,
    E,
    levels,
    TARGET: tl.constexpr,
    SEVERAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: a block of one sample."""
    b, start, lane, inside = block_of_program(E, BLOCK)
    place = place_of_level(b, levels[0], start, lane, levels[1], BLOCK, SEVERAL)
    a = load_level(alpha, place, inside, SEVERAL)
    s = load_level(sigma, place, inside, SEVERAL)
    x = load_block(x0 + b * x0_stride + start, lane, inside)
    z = noise_block(noise, noise_stride, key, sample_ids, b, start, lane, inside, BLOCK, WIDE)
    first = b * E + start
    store_block(x_t + first, lane, tl.fma(s, z, a * x), inside)
    store_block(target + first, lane, target_of(x, z, a, s, TARGET), inside)


@triton.jit
def target_of(x, z, a, s, TARGET: tl.constexpr):
    if TARGET == "epsilon":
        return z
    elif TARGET == "sample":
        return x
    elif TARGET == "v":
        return tl.fma(a, z, -(s * x))
    else:
        return z - x
