from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels.reference.diffuse import by_element
from vqkernels.reference.normal_noise import normals_of_steps


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`index` has the shape of sample's first dimensions, or none."""
    wide = torch.promote_types(sample.dtype, torch.float32)
    row = by_element(index.clamp(0, len(coefficients) - 1), sample)  # [B, ..., 1, ...]
    columns = coefficients.to(wide).T[:, row]  # [22, B, ..., 1, ...]
    guidance, rescale, of_sample, of_output, clip = columns[:5]
    log_min, log_max = columns[13:15]

    x, output = sample.to(wide), model_output.to(wide)
    if uncond_output is not None:
        output = _guided(output, uncond_output.to(wide), guidance, rescale)
    prediction = _term(of_sample, x) + _term(of_output, output)
    if threshold == "clip":
        prediction = torch.maximum(torch.minimum(prediction, clip), -clip)
    elif threshold == "dynamic":
        prediction = _dynamic(prediction, clip, ratio)

    operands = [x, prediction, output, *(entry.to(wide) for entry in history)]
    before = _sum(columns[5:12], operands)
    if noise is not None or key is not None:
        if noise is None:
            assert key is not None
            noise = normals_of_steps(sample.shape, key, sample_ids, row + key[1])
        z = noise.to(wide)
        if variance is not None:
            z = z * _deviation(variance.to(wide), log_min, log_max, variance_type)
        before = before + _term(columns[12], z)
    extra = _sum(columns[15:], operands)
    return (
        before.to(sample.dtype),
        prediction.to(sample.dtype) if want_prediction else sample.new_empty(0),
        extra.to(sample.dtype) if want_extra else sample.new_empty(0),
    )


def _term(coefficient: Tensor, x: Tensor) -> Tensor:
    """Their product, and 0 where the coefficient is 0, whatever x is."""
    return torch.where(coefficient == 0, torch.zeros_like(x), coefficient * x)


def _sum(coefficients: Tensor, operands: list[Tensor]) -> Tensor:
    terms = [_term(c, x) for c, x in zip(coefficients, operands, strict=False)]
    return functools.reduce(torch.add, terms)  # in order: a sample does not depend on its batch


def _guided(output: Tensor, uncond: Tensor, guidance: Tensor, rescale: Tensor) -> Tensor:
    """Ho & Salimans 2022, arXiv:2207.12598, rescaled as in Lin et al. 2023, arXiv:2305.08891."""
    guided = output + _term(guidance - 1, output - uncond)
    inner = tuple(range(1, output.dim()))
    if not inner or output[0:1].numel() < 2:
        return guided
    ratio = output.std(inner, keepdim=True) / guided.std(inner, keepdim=True)
    return guided * torch.where(rescale == 0, 1.0, rescale * ratio + 1 - rescale)


def _dynamic(prediction: Tensor, clip: Tensor, ratio: float) -> Tensor:
    """Saharia et al. 2022, arXiv:2205.11487, section 2.3."""
    if prediction.numel() == 0:
        return prediction
    sizes = prediction.abs().reshape(len(prediction), -1)  # [B, E]
    ranked = sizes.sort(dim=1).values  # torch.quantile stops at 2^24 elements
    last = sizes.shape[1] - 1
    at = ratio * last
    below, above = int(at), math.ceil(at)
    low, high = ranked[:, below], ranked[:, above]
    quantile = torch.where(high == low, low, low + (high - low) * (at - below))
    quantile = torch.where(ranked[:, -1].isnan(), ranked[:, -1], quantile)
    s = by_element(quantile, prediction)  # [B, 1, ...]
    s = torch.minimum(s.clamp(min=1), clip)
    return torch.maximum(torch.minimum(prediction, s), -s) / s


def _deviation(v: Tensor, log_min: Tensor, log_max: Tensor, variance_type: str) -> Tensor:
    """Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15."""
    if variance_type == "learned":
        return v.sqrt()
    return ((v + 1) / 2 * (log_max - log_min) / 2 + log_min / 2).exp()
