"""One step of a sampler: a few coefficients and one pass, the same for every sampler.

With c the row of `coefficients` that an element's step has,

    output     = model_output + (guidance - 1) (model_output - uncond_output)      guided
    output    *= guidance_rescale std(model_output) / std(output) + 1 - guidance_rescale
    prediction = prediction_sample * sample + prediction_output * output           then thresholded
    prev       = prev_sample * sample + prev_prediction * prediction + prev_output * output
                 + sum_i prev_history_i * history_i + prev_noise * std * noise
    extra      = the same sum with extra_* for prev_*, without the noise

A term whose coefficient is 0 is left out: 0 * inf counts as 0. Sources: guidance, Ho & Salimans
2022, arXiv:2207.12598; its rescaling, Lin et al. 2023, arXiv:2305.08891; dynamic thresholds,
Saharia et al. 2022, arXiv:2205.11487; learned variances, Nichol & Dhariwal 2021, arXiv:2102.09672.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_choice, check_same_device, check_tensor
from vqkernels.ops._direct import traced, write
from vqkernels.ops._library import define_writing, fake, not_differentiable
from vqkernels.ops._noise import (
    at_levels,
    check_like,
    check_noise,
    check_out,
    check_samples,
    noise_key,
)
from vqkernels.reference import denoise_step as reference

COLUMNS = (
    "guidance",
    "guidance_rescale",
    "prediction_sample",
    "prediction_output",
    "clip",
    "prev_sample",
    "prev_prediction",
    "prev_output",
    *(f"prev_history_{i}" for i in range(4)),
    "prev_noise",
    "variance_log_min",
    "variance_log_max",
    "extra_sample",
    "extra_prediction",
    "extra_output",
    *(f"extra_history_{i}" for i in range(4)),
)
MAX_HISTORY = 4
THRESHOLDS = ("none", "clip", "dynamic")
VARIANCE_TYPES = ("learned_range", "learned")

_denoise_step, _kernels = define_writing(
    "denoise_step(Tensor sample, Tensor model_output, Tensor coefficients, Tensor index,"
    " Tensor? uncond_output, Tensor[] history, Tensor? variance, Tensor? noise, Tensor? key,"
    " Tensor? sample_ids, str threshold, float ratio, str variance_type, bool want_prediction,"
    " bool want_extra) -> (Tensor, Tensor, Tensor)",
    reference.denoise_step,
)


@fake(_denoise_step)
def _(
    sample: Tensor, model_output: Tensor, coefficients: Tensor, index: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    want_prediction, want_extra = rest[-3:-1]
    shape = sample.shape
    return (
        sample.new_empty(shape),
        sample.new_empty(shape if want_prediction else 0),
        sample.new_empty(shape if want_extra else 0),
    )


not_differentiable(_denoise_step, "sampling steps have no gradient")


class DenoiseStepOutput(NamedTuple):
    """What a step gives: tensors of the sample's shape and dtype, None where not asked for."""

    prev_sample: Tensor
    prediction: Tensor | None
    extra: Tensor | None


def denoise_coefficients(**columns: float | Sequence[float] | Tensor) -> Tensor:
    """The table `[T, 22]` of T steps that `denoise_step` reads.

    Args:
        columns: values by the names in `COLUMNS`, a number or T of them each. `guidance` is 1 and
            `clip` infinite where not given, every other column 0.

    Returns:
        float32 on the CPU, rounded once from float64.

    Raises:
        TypeError: an unknown column.
        ValueError: columns of different lengths, or a NaN.

    >>> denoise_coefficients(prev_sample=1.0, prev_output=[-0.5, -0.5]).shape
    torch.Size([2, 22])
    """
    values = {}
    for name, value in columns.items():
        if name not in COLUMNS:
            raise TypeError(f"columns are {', '.join(COLUMNS)}, got {name!r}")
        values[name] = torch.as_tensor(value, dtype=torch.float64).cpu().reshape(-1)
        if values[name].isnan().any():
            raise ValueError(f"{name} must not be NaN, got {values[name].tolist()}")
    lengths = {name: len(value) for name, value in values.items() if len(value) != 1}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must have one length, got {lengths}")
    steps = next(iter(lengths.values()), 1)
    table = torch.zeros(steps, len(COLUMNS), dtype=torch.float64)
    table[:, COLUMNS.index("guidance")] = 1
    table[:, COLUMNS.index("clip")] = torch.inf
    for name, value in values.items():
        table[:, COLUMNS.index(name)] = value
    return table.float()


def denoise_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    index: Tensor | None = None,
    uncond_output: Tensor | None = None,
    history: Sequence[Tensor] = (),
    variance: Tensor | None = None,
    variance_type: str = "learned_range",
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int | Tensor = 0,
    threshold: str = "none",
    ratio: float = 0.995,
    want_prediction: bool = False,
    want_extra: bool = False,
    out: Tensor | None = None,
) -> DenoiseStepOutput:
    """The next sample of a sampler whose steps are rows of `coefficients`; one launch, no sync.

    Args:
        sample: `[B, ...]`, floating point: the state, whose dtype results have.
        model_output: sample's shape, any floating dtype. Halves of a channel split or of a batch
            are read without a copy.
        coefficients: float32 `[T, 22]` from `denoise_coefficients`, on the sample's device.
        index: int64, which row: a scalar, `[B]`, or the first dimensions of sample's shape with
            ones where it does not vary; clamped into the table. None is row 0.
        uncond_output: the unconditional prediction, for classifier-free guidance.
        history: up to 4 tensors of sample's shape and dtype: earlier predictions.
        variance: what the model says of the variance, model_output's shape and dtype.
        variance_type: "learned_range" (-1 to 1 between two log variances) or "learned" (itself).
        noise: sample's shape; this or `seed`, or neither where `prev_noise` is 0.
        seed, sample_ids, step, stream: draw the noise as
            `normal_noise(sample.shape, step=index + step, ...)` does.
        threshold: of the prediction: "none"; "clip" to [-clip, clip]; "dynamic": to the sample's
            `ratio` quantile of absolute values s = clamp(quantile, 1, clip), divided by s.
        want_prediction, want_extra: whether to write these results.
        out: a contiguous tensor to write the next sample into; it may be `sample`.

    Returns:
        `(prev_sample, prediction, extra)`, computed in fp32, without a gradient.

    Raises:
        TypeError: an argument is not a tensor of the kind it must be.
        ValueError: a shape, device or name that does not fit; both of `noise` and `seed`; rows
            that vary inside a sample with "dynamic" or guidance.
    """
    check_samples("sample", sample)
    check_like("model_output", model_output, "sample", sample)
    for name, tensor in (("uncond_output", uncond_output), ("variance", variance)):
        if tensor is not None:
            check_like(name, tensor, "sample", sample)
            if tensor.dtype != model_output.dtype:
                raise TypeError(
                    f"{name} must have model_output's dtype {model_output.dtype}, "
                    f"got {tensor.dtype}"
                )
    _check_history(history, sample)
    _check_table(coefficients, sample)
    check_choice("threshold", threshold, THRESHOLDS)
    check_choice("variance_type", variance_type, VARIANCE_TYPES)
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    rows = _rows(index, sample)
    if rows.dim() > 1 and (threshold == "dynamic" or uncond_output is not None):
        raise ValueError(
            f"index must be a scalar or [{sample.shape[0]}] with "
            f"{'guidance' if uncond_output is not None else 'dynamic thresholds'}, "
            f"got {list(rows.shape)}"
        )
    check_noise("sample", sample, noise, seed, sample_ids, optional=True)
    key = None if seed is None else noise_key(seed, step, stream, sample.device)
    backend = select("denoise_step", sample, model_output, noise)
    arguments = (
        sample,
        model_output,
        coefficients,
        rows,
        uncond_output,
        list(history),
        variance,
        noise,
        key,
        sample_ids,
        threshold,
        ratio,
        variance_type,
        want_prediction,
        want_extra,
    )
    if out is not None:
        check_out("out", out, sample.shape, sample.dtype)
        results = write(_kernels, arguments, backend, [out])
    elif traced():
        with torch.no_grad():
            results = _denoise_step(*arguments, backend)
    else:
        results = write(_kernels, arguments, backend, ())
    prev, prediction, extra = results
    return DenoiseStepOutput(
        prev if out is None else out,
        prediction if want_prediction else None,
        extra if want_extra else None,
    )


def _rows(index: Tensor | None, sample: Tensor) -> Tensor:
    if index is None:
        return torch.zeros((), dtype=torch.int64, device=sample.device)
    check_tensor("index", index)
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if index.dim() == 0:
        check_same_device("index", index, "sample", sample)
        return index
    return at_levels("index", index, "sample", sample)


def _check_history(history: Sequence[Tensor], sample: Tensor) -> None:
    if len(history) > MAX_HISTORY:
        raise ValueError(f"history must hold at most {MAX_HISTORY} tensors, got {len(history)}")
    for i, entry in enumerate(history):
        check_like(f"history[{i}]", entry, "sample", sample)
        if entry.dtype != sample.dtype:
            raise TypeError(
                f"history[{i}] must have sample's dtype {sample.dtype}, got {entry.dtype}"
            )


def _check_table(coefficients: Tensor, sample: Tensor) -> None:
    check_tensor("coefficients", coefficients)
    if coefficients.dtype != torch.float32:
        raise TypeError(f"coefficients must be float32, got {coefficients.dtype}")
    check_same_device("coefficients", coefficients, "sample", sample)
    if (
        coefficients.dim() != 2
        or coefficients.shape[1] != len(COLUMNS)
        or coefficients.shape[0] == 0
    ):
        raise ValueError(
            f"coefficients must be [T, {len(COLUMNS)}] with a row at least, "
            f"got {list(coefficients.shape)}"
        )
