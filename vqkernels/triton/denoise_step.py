"""Launch of `denoise_step`: one, whatever the sampler.

Floor: each operand read and each result written once. Absent operands and results are None, which
a kernel is compiled for; coefficients, the step's row and the key are read on the device, and no
noise is drawn where its coefficient is 0.

A rescaled guidance and a dynamic threshold need numbers of the whole sample. Every program finds
them for itself, in passes over the sample (two for the rescaling, five for a quantile), in one
order, and then writes its share: no program waits for another.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.denoise_terms import (
    CLIP,
    COLUMNS,
    EXTRA,
    LOG_MAX,
    LOG_MIN,
    PREV,
    PREV_NOISE,
    clamped,
    dynamic_bound,
    load_output,
    prediction_of,
    rescaling,
    with_term,
)
from vqkernels.triton.launch import device_facts, launch
from vqkernels.triton.noise_configs import block_and_warps, config_of
from vqkernels.triton.samples import (
    Levels,
    block_at,
    blocks_of,
    drawn_block,
    drawn_elements,
    has_halves,
    level_at,
    levels_of,
    load_block,
    samples_of,
    store_block,
)


def denoise_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    uncond_output: Tensor | None,
    history: Sequence[Tensor],
    variance: Tensor | None,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    threshold: str,
    ratio: float,
    variance_type: str,
    want_prediction: bool,
    want_extra: bool,
    out: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    prev = out[0] if out else sample.new_empty(sample.shape)
    prediction = sample.new_empty(sample.shape if want_prediction else 0)
    extra = sample.new_empty(sample.shape if want_extra else 0)
    if sample.numel() == 0:
        return prev, prediction, extra
    batch = sample.shape[0]
    elements = sample.numel() // batch
    kind = "dynamic step" if threshold == "dynamic" else "step"
    if kind == "step" and uncond_output is not None:
        kind = "guided step"
    config = config_of(kind)
    block, num_warps = block_and_warps(config, elements)
    spread = triton.cdiv(elements, block)
    if config.programs:
        multiprocessors = device_facts(sample.device).multiprocessors
        spread = min(spread, triton.cdiv(config.programs * multiprocessors, batch))
    if kind == "dynamic step" and out:
        # What is written may be what another program still counts.
        spread = 1
    # One row for all samples stands at the same place for each of them.
    levels = levels_of(sample, index) if index.dim() else Levels(0, elements)
    at = ratio * (elements - 1)
    below = min(int(at), elements - 1)
    operands = [samples_of(x) for x in (sample, model_output, uncond_output, variance, noise)]
    earlier = [samples_of(x) for x in history]
    launch(
        _denoise_step,
        batch * spread,
        *(part for operand in operands for part in operand),
        tuple(entry.tensor for entry in earlier),
        tuple(entry.stride for entry in earlier),
        key,
        sample_ids,
        coefficients.contiguous(),
        coefficients.shape[0],
        index,
        tuple(levels),
        prev,
        prediction if want_prediction else None,
        extra if want_extra else None,
        elements,
        spread,
        below,
        float(at - below),
        THRESHOLD=threshold,
        VARIANCE=variance_type,
        SEVERAL=levels.each > 1,
        ALIGNED=levels.size % 4 == 0,
        BLOCK=block,
        WIDE=has_halves(sample, model_output),
        num_warps=num_warps,
    )
    return prev, prediction, extra


@triton.jit
def _denoise_step(
    sample,
    sample_stride,
    model_output,
    output_stride,
    uncond_output,
    uncond_stride,
    variance,
    variance_stride,
    noise,
    noise_stride,
    history,
    history_strides,
    key,
    sample_ids,
    coefficients,
    rows,
    index,
    levels,
    prev_sample,
    prediction,
    extra,
    E,
    spread,
    below,
    fraction,
    THRESHOLD: tl.constexpr,
    VARIANCE: tl.constexpr,
    SEVERAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: every `spread`th block of one sample."""
    b = (tl.program_id(0) // spread).to(tl.int64)
    sample += b * sample_stride
    model_output += b * output_stride
    if uncond_output is not None:
        uncond_output += b * uncond_stride
    factor = tl.full([], 1.0, tl.float32)
    if not SEVERAL:
        row = _row_at(index + b * levels[0], rows)
        c = coefficients + row * COLUMNS
        if uncond_output is not None:
            factor = rescaling(model_output, uncond_output, c, E, BLOCK)
        if THRESHOLD == "dynamic":
            bound = dynamic_bound(
                sample, model_output, uncond_output, c, factor, E, below, fraction, BLOCK
            )
    for block in range(tl.program_id(0) % spread, blocks_of(E, BLOCK), spread):
        start, lane, inside = block_at(block, E, BLOCK)
        base = b * E + start
        if SEVERAL:
            place = b * levels[0] + level_at(start, lane, levels[1], BLOCK)
            row = _row_at(index + place, rows, inside)
            c = coefficients + row * COLUMNS

        x = load_block(sample + start, lane, inside)
        output = load_output(model_output, uncond_output, c, start, lane, inside)
        if uncond_output is not None:
            output *= factor
        predicted = prediction_of(x, output, c)
        if THRESHOLD == "clip":
            predicted = clamped(predicted, tl.load(c + CLIP))
        elif THRESHOLD == "dynamic":
            predicted = clamped(predicted, bound) / bound
        prev = _sum_of_terms(c + PREV, x, predicted, output)
        if extra is not None:
            more = _sum_of_terms(c + EXTRA, x, predicted, output)
        if prediction is not None:
            store_block(prediction + base, lane, predicted, inside)
        for i in tl.static_range(len(history)):
            earlier = load_block(history[i] + b * history_strides[i] + start, lane, inside)
            prev = with_term(prev, tl.load(c + PREV + 3 + i), earlier)
            if extra is not None:
                more = with_term(more, tl.load(c + EXTRA + 3 + i), earlier)
        if extra is not None:
            store_block(extra + base, lane, more, inside)

        if (noise is not None) or (key is not None):
            weight = tl.load(c + PREV_NOISE)
            if noise is not None:
                z = load_block(noise + b * noise_stride + start, lane, inside)
            elif not SEVERAL:
                z = tl.zeros([BLOCK], tl.float32)
                if weight != 0:
                    z = drawn_block(key, sample_ids, b, start, row + tl.load(key + 1), BLOCK, WIDE)
            elif ALIGNED:
                first = 4 * tl.arange(0, BLOCK // 4)
                place = b * levels[0] + level_at(start, first, levels[1], BLOCK)
                step = _row_at(index + place, rows, first < E - start) + tl.load(key + 1)
                z = drawn_block(key, sample_ids, b, start, step, BLOCK, False)
            else:
                z = drawn_elements(key, sample_ids, b, start, row + tl.load(key + 1), BLOCK)
            if variance is not None:
                v = load_block(variance + b * variance_stride + start, lane, inside)
                z *= _deviation(v, c, VARIANCE)
            prev = with_term(prev, weight, z)
        store_block(prev_sample + base, lane, prev, inside)


@triton.jit
def _row_at(place, rows, inside=None):
    """Clamped, so that nothing outside of the table is read."""
    row = tl.load(place) if inside is None else tl.load(place, mask=inside, other=0)
    return tl.minimum(tl.maximum(row, 0), rows - 1)


@triton.jit
def _sum_of_terms(c, x, predicted, output):
    total = with_term(tl.zeros_like(x), tl.load(c), x)
    total = with_term(total, tl.load(c + 1), predicted)
    return with_term(total, tl.load(c + 2), output)


@triton.jit
def _deviation(v, c, VARIANCE: tl.constexpr):
    """arXiv:2102.09672, equation 15, or the root of a variance."""
    if VARIANCE == "learned":
        return tl.sqrt(v)
    else:
        low, high = tl.load(c + LOG_MIN), tl.load(c + LOG_MAX)
        return tl.exp((v + 1.0) * 0.25 * (high - low) + 0.5 * low)
