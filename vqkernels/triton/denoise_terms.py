"""What a denoising step is made of: coefficients, guidance, predictions, and what is known only of
a whole sample. `c` points to an element's row of coefficients, a scalar or one for each element."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from vqkernels.triton.samples import block_at, blocks_of, load_block

# Columns of a row, as `vqkernels.ops.denoise_step.COLUMNS` has them.
COLUMNS = tl.constexpr(22)
GUIDANCE = tl.constexpr(0)
GUIDANCE_RESCALE = tl.constexpr(1)
PREDICTION_SAMPLE = tl.constexpr(2)
PREDICTION_OUTPUT = tl.constexpr(3)
CLIP = tl.constexpr(4)
PREV = tl.constexpr(5)
PREV_NOISE = tl.constexpr(12)
LOG_MIN = tl.constexpr(13)
LOG_MAX = tl.constexpr(14)
EXTRA = tl.constexpr(15)

_BINS = tl.constexpr(256)
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def with_term(total, weight, x):
    """total + weight x; a weight of 0 leaves x out, whatever it is."""
    return tl.where(weight == 0, total, tl.fma(weight, x, total))


@triton.jit
def clamped(x, bound):
    """A comparison is false for a NaN, which so stays one."""
    below = tl.where(x > bound, bound, x)
    return tl.where(below < -bound, -bound, below)


@triton.jit
def load_output(model_output, uncond_output, c, start, lane, inside):
    """The model's output at a block, guided but not rescaled."""
    output = load_block(model_output + start, lane, inside)
    if uncond_output is not None:
        uncond = load_block(uncond_output + start, lane, inside)
        output = with_term(output, tl.load(c + GUIDANCE) - 1.0, output - uncond)
    return output


@triton.jit
def prediction_of(x, output, c):
    of_sample = with_term(tl.zeros_like(x), tl.load(c + PREDICTION_SAMPLE), x)
    return with_term(of_sample, tl.load(c + PREDICTION_OUTPUT), output)


@triton.jit
def rescaling(model_output, uncond_output, c, E, BLOCK: tl.constexpr):
    """What the guided output of a sample is multiplied by: its deviation becomes the plain one's,
    as far as the row's rescale says."""
    rescale = tl.load(c + GUIDANCE_RESCALE)
    factor = tl.full([], 1.0, tl.float32)
    if (rescale != 0) & (E > 1):
        plain, guided = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for block in range(blocks_of(E, BLOCK)):
            start, lane, inside = block_at(block, E, BLOCK)
            plain += load_block(model_output + start, lane, inside)
            guided += load_output(model_output, uncond_output, c, start, lane, inside)
        plain_mean, guided_mean = tl.sum(plain, 0) / E, tl.sum(guided, 0) / E
        plain, guided = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for block in range(blocks_of(E, BLOCK)):
            start, lane, inside = block_at(block, E, BLOCK)
            off = load_block(model_output + start, lane, inside) - plain_mean
            plain += tl.where(inside, off * off, 0.0)
            off = load_output(model_output, uncond_output, c, start, lane, inside) - guided_mean
            guided += tl.where(inside, off * off, 0.0)
        ratio = tl.sqrt(tl.sum(plain, 0) / tl.sum(guided, 0))
        factor = rescale * ratio + 1.0 - rescale
    return factor


@triton.jit
def dynamic_bound(
    sample, model_output, uncond_output, c, factor, E, below, fraction, BLOCK: tl.constexpr
):
    """The quantile of a sample's absolute predictions between the one of rank `below` and the next,
    clamped to [1, clip]. Bits of absolute values are ordered as the values are, a NaN behind all:
    four passes count eight of them each, a fifth finds the next value."""
    bins = tl.arange(0, _BINS)
    prefix, top = tl.full([], 0, tl.int32), tl.full([], 31, tl.int32)
    rank, equals = tl.full([], below, tl.int64), tl.full([], 0, tl.int64)
    for _ in range(4):
        low = tl.maximum(top - 8, 0)
        counts = tl.zeros([_BINS], tl.int64)
        for block in range(blocks_of(E, BLOCK)):
            bits, inside = _bits_of_block(
                sample, model_output, uncond_output, c, factor, E, block, BLOCK
            )
            digit = (bits >> low) & ((1 << (top - low)) - 1)
            counts += tl.histogram(digit, _BINS, mask=inside & (bits >> top == prefix)).to(tl.int64)
        wanted = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32), 0)
        rank -= tl.sum(tl.where(bins < wanted, counts, 0), 0)
        equals = tl.sum(tl.where(bins == wanted, counts, 0), 0)
        prefix = (prefix << (top - low)) | wanted
        top = low
    behind, greatest = tl.full([BLOCK], _NAN, tl.int32), tl.zeros([BLOCK], tl.int32)
    for block in range(blocks_of(E, BLOCK)):
        bits, inside = _bits_of_block(
            sample, model_output, uncond_output, c, factor, E, block, BLOCK
        )
        behind = tl.minimum(behind, tl.where(inside & (bits > prefix), bits, _NAN))
        greatest = tl.maximum(greatest, tl.where(inside, bits, 0))
    next_bits = tl.where((rank + 1 < equals) | (below + 1 >= E), prefix, tl.min(behind, 0))
    value, after = prefix.to(tl.float32, bitcast=True), next_bits.to(tl.float32, bitcast=True)
    rest = 1.0 - fraction
    value = tl.where(
        fraction < 0.5, value + fraction * (after - value), after - rest * (after - value)
    )
    value = tl.where(tl.max(greatest, 0) > _INFINITY, float("nan"), value)
    clip = tl.load(c + CLIP)
    value = tl.where(value < 1.0, 1.0, value)
    return tl.where(value > clip, clip, value)


@triton.jit
def _bits_of_block(sample, model_output, uncond_output, c, factor, E, block, BLOCK: tl.constexpr):
    """(bits of absolute predictions, which of them are inside)."""
    start, lane, inside = block_at(block, E, BLOCK)
    x = load_block(sample + start, lane, inside)
    output = factor * load_output(model_output, uncond_output, c, start, lane, inside)
    bits = prediction_of(x, output, c).to(tl.int32, bitcast=True)
    return bits & 0x7FFFFFFF, inside
