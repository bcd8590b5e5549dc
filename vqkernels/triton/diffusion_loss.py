"""Launches of `diffusion_loss` and its gradients.

Floor, bytes an element, s the tensors' size: 2 s forward (model_output and x0 read), 3 s backward
(both read again, a gradient written), and a given noise's own each time.
A level is summed in fixed chunks of elements, and these in order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.diffuse import target_of
from vqkernels.triton.launch import launch
from vqkernels.triton.noise_configs import BlockConfig, block_and_warps, chunk_of, config_of
from vqkernels.triton.normals import normals_from, normals_of_elements
from vqkernels.triton.samples import (
    block_of_program,
    blocks_of,
    has_halves,
    levels_of,
    load_block,
    load_level,
    noise_block,
    place_of_level,
    samples_of,
    store_block,
)

_COMBINED = 256


def diffusion_loss(
    model_output: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    weight: Tensor | None,
    delta: Tensor | None,
    target: str,
    loss: str,
    *,
    config: BlockConfig | None = None,
) -> Tensor:
    """float32, alpha's shape."""
    losses = alpha.new_empty(alpha.shape)
    if x0.numel() == 0:
        return losses.fill_(float("nan"))
    config = config or config_of("loss")
    predicted, data, given = samples_of(model_output), samples_of(x0), samples_of(noise)
    levels, count = levels_of(x0, alpha), alpha.numel()
    width = min(config.block, max(4, triton.next_power_of_2(levels.size)))
    chunk = chunk_of(config, levels.size, count, width)
    chunks = triton.cdiv(levels.size, chunk)
    sums = losses if chunks == 1 else alpha.new_empty(count * chunks)
    launch(
        _sum_losses,
        triton.cdiv(count, config.block // width) * chunks,
        predicted.tensor,
        predicted.stride,
        data.tensor,
        data.stride,
        alpha,
        sigma,
        given.tensor,
        given.stride,
        key,
        sample_ids,
        weight,
        delta,
        sums,
        count,
        tuple(levels),
        chunk,
        TARGET=target,
        LOSS=loss,
        WHOLE=chunks == 1,
        ALIGNED=levels.each == 1 or levels.size % 4 == 0,
        LEVELS=config.block // width,
        WIDTH=width,
        WIDE=width >= 8 and has_halves(model_output, x0, noise),
        num_warps=config.num_warps,
    )
    if chunks > 1:
        launch(
            _combine_losses,
            triton.cdiv(count, _COMBINED),
            sums,
            weight,
            losses,
            count,
            chunks,
            levels.size,
            BLOCK=_COMBINED,
            num_warps=4,
        )
    return losses


def diffusion_loss_backward(
    grad: Tensor,
    model_output: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    weight: Tensor | None,
    delta: Tensor | None,
    target: str,
    loss: str,
    needs_x0: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of model_output and, where needed, of x0."""
    grad_output = model_output.new_empty(model_output.shape)
    grad_x0 = x0.new_empty(x0.shape if needs_x0 else 0)
    if x0.numel() == 0:
        return grad_output, grad_x0
    predicted, data, given = samples_of(model_output), samples_of(x0), samples_of(noise)
    levels = levels_of(x0, alpha)
    elements = levels.each * levels.size
    block, num_warps = block_and_warps(config_of("loss backward"), elements)
    launch(
        _loss_backward,
        x0.shape[0] * triton.cdiv(elements, block),
        predicted.tensor,
        predicted.stride,
        data.tensor,
        data.stride,
        grad.contiguous(),
        alpha,
        sigma,
        given.tensor,
        given.stride,
        key,
        sample_ids,
        weight,
        delta,
        grad_output,
        grad_x0 if needs_x0 else None,
        elements,
        tuple(levels),
        TARGET=target,
        LOSS=loss,
        SEVERAL=levels.each > 1,
        BLOCK=block,
        WIDE=has_halves(model_output, x0, noise),
        num_warps=num_warps,
    )
    return grad_output, grad_x0


@triton.jit
def _sum_losses(
    model_output,
    output_stride,
    x0,
    x0_stride,
    alpha,
    sigma,
    noise,
    noise_stride,
    key,
    sample_ids,
    weight,
    delta,
    sums,
    count,
    levels,
    chunk,
    TARGET: tl.constexpr,
    LOSS: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: the same chunk of LEVELS levels. ALIGNED levels begin with a counter."""
    chunks = blocks_of(levels[1], chunk)
    level = (tl.program_id(0) // chunks).to(tl.int64) * LEVELS + tl.arange(0, LEVELS)
    used = level < count
    b = level // levels[0]
    begin = level % levels[0] * levels[1]
    a = tl.load(alpha + level, mask=used, other=0.0)[:, None]
    s = tl.load(sigma + level, mask=used, other=0.0)[:, None]
    d = a if LOSS == "mse" else tl.load(delta + level, mask=used, other=1.0)[:, None]
    if noise is None:
        ids = b
        if sample_ids is not None:
            ids = tl.load(sample_ids + b, mask=used, other=0)
        seed, step, stream = tl.load(key), tl.load(key + 1), tl.load(key + 2)
    lane = tl.arange(0, WIDTH).to(tl.int64)[None, :]
    first = (tl.program_id(0) % chunks).to(tl.int64) * chunk
    end = tl.minimum(first + chunk, levels[1])
    total = tl.zeros([LEVELS, WIDTH], tl.float32)
    for start in range(first, end, WIDTH):
        inside = used[:, None] & (lane < end - start)
        at = begin + start
        o = load_block(model_output + (b * output_stride + at)[:, None], lane, inside)
        x = load_block(x0 + (b * x0_stride + at)[:, None], lane, inside)
        if noise is not None:
            z = load_block(noise + (b * noise_stride + at)[:, None], lane, inside)
        elif ALIGNED:
            quad = (at >> 2)[:, None]
            id = ids[:, None]
            z = normals_from(seed, quad, id, step, stream, [LEVELS, WIDTH], WIDTH, WIDE)
        else:
            z = normals_of_elements(seed, at[:, None] + lane, ids[:, None], step, stream)
        each = _loss_of(o - target_of(x, z, a, s, TARGET), d, LOSS)
        total += tl.where(inside, each, 0.0)
    summed = tl.sum(total, 1)
    if WHOLE:
        _store_losses(sums, summed, weight, level, used, levels[1])
    else:
        tl.store(sums + level * chunks + tl.program_id(0) % chunks, summed, mask=used)


@triton.jit
def _combine_losses(sums, weight, losses, count, chunks, level_size, BLOCK: tl.constexpr):
    """One program: BLOCK levels, their chunks in order."""
    level = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = level < count
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(chunks):
        total += tl.load(sums + level * chunks + chunk, mask=used, other=0.0)
    _store_losses(losses, total, weight, level, used, level_size)


@triton.jit
def _store_losses(losses, summed, weight, level, used, level_size):
    mean = summed / level_size
    if weight is not None:
        mean *= tl.load(weight + level, mask=used, other=0.0)
    tl.store(losses + level, mean, mask=used)


@triton.jit
def _loss_backward(
    model_output,
    output_stride,
    x0,
    x0_stride,
    grad,
    alpha,
    sigma,
    noise,
    noise_stride,
    key,
    sample_ids,
    weight,
    delta,
    grad_output,
    grad_x0,
    E,
    levels,
    TARGET: tl.constexpr,
    LOSS: tl.constexpr,
    SEVERAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: a block of one sample."""
    b, start, lane, inside = block_of_program(E, BLOCK)
    place = place_of_level(b, levels[0], start, lane, levels[1], BLOCK, SEVERAL)
    a = load_level(alpha, place, inside, SEVERAL)
    s = load_level(sigma, place, inside, SEVERAL)
    scale = load_level(grad, place, inside, SEVERAL)
    if weight is not None:
        scale *= load_level(weight, place, inside, SEVERAL)
    scale /= levels[1]
    d = a if LOSS == "mse" else load_level(delta, place, inside, SEVERAL)
    o = load_block(model_output + b * output_stride + start, lane, inside)
    x = load_block(x0 + b * x0_stride + start, lane, inside)
    z = noise_block(noise, noise_stride, key, sample_ids, b, start, lane, inside, BLOCK, WIDE)
    by_output = scale * _slope_of(o - target_of(x, z, a, s, TARGET), d, LOSS)
    first = b * E + start
    store_block(grad_output + first, lane, by_output, inside)
    if grad_x0 is not None:
        store_block(grad_x0 + first, lane, by_output * _per_x0(s, TARGET), inside)


@triton.jit
def _loss_of(difference, d, LOSS: tl.constexpr):
    if LOSS == "mse":
        return difference * difference
    elif LOSS == "huber":
        size = tl.abs(difference)
        return tl.where(size <= d, 0.5 * size * size, d * (size - 0.5 * d))
    else:
        # 2 d (root - d) without its cancellation; beyond fp32 the root is all there is.
        root = tl.sqrt(tl.fma(difference, difference, d * d))
        return 2.0 * d * tl.where(root < float("inf"), difference * (difference / (root + d)), root)


@triton.jit
def _slope_of(difference, d, LOSS: tl.constexpr):
    if LOSS == "mse":
        return 2.0 * difference
    elif LOSS == "huber":
        # A comparison is false for a NaN, which so stays one.
        below = tl.where(difference > d, d, difference)
        return tl.where(below < -d, -d, below)
    else:
        return 2.0 * d * difference / tl.sqrt(tl.fma(difference, difference, d * d))


@triton.jit
def _per_x0(s, TARGET: tl.constexpr):
    """What the difference changes by with x0."""
    if TARGET == "v":
        return s
    else:
        return 0.0 if TARGET == "epsilon" else -1.0 if TARGET == "sample" else 1.0
