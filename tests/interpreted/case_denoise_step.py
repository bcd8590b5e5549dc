"""`denoise_step` in Triton against the reference in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from _helpers.noising import Numbers, judge_noising, key_on, levels_in, run, table_of_steps
from torch import Tensor

from vqkernels import denoise_coefficients
from vqkernels.ops.denoise_step import COLUMNS
from vqkernels.triton import denoise_step, denoise_terms

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(3, 1), (2, 3, 8), (2, 2, 3, 5), (2, 1100)]
KEY = key_on("cpu")


def arguments_of(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    *,
    uncond_output: Tensor | None = None,
    history: tuple[Tensor, ...] = (),
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    key: Tensor | None = None,
    sample_ids: Tensor | None = None,
    threshold: str = "none",
    ratio: float = 0.995,
    variance_type: str = "learned_range",
    want: bool = True,
) -> tuple[Any, ...]:
    tensors = (sample, model_output, coefficients, index, uncond_output, list(history))
    drawn = (variance, noise, key, sample_ids)
    return *tensors, *drawn, threshold, ratio, variance_type, want, want


def judge_step(*tensors: Tensor, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return judge_noising("denoise_step", "triton", *arguments_of(*tensors, **more))


def indices_in(shape: tuple[int, ...]) -> list[Tensor]:
    """Rows at every level, some outside of the table."""
    found = [torch.tensor(3)]
    for at in levels_in(shape):
        count = torch.Size(at).numel()
        found.append((torch.arange(count) * 5 % 7 - 1).reshape(at))
    return found


def test_columns():
    """The kernels' columns are those of the table."""
    places = {
        "guidance": denoise_terms.GUIDANCE,
        "guidance_rescale": denoise_terms.GUIDANCE_RESCALE,
        "prediction_sample": denoise_terms.PREDICTION_SAMPLE,
        "prediction_output": denoise_terms.PREDICTION_OUTPUT,
        "clip": denoise_terms.CLIP,
        "prev_sample": denoise_terms.PREV,
        "prev_noise": denoise_terms.PREV_NOISE,
        "variance_log_min": denoise_terms.LOG_MIN,
        "variance_log_max": denoise_terms.LOG_MAX,
        "extra_sample": denoise_terms.EXTRA,
    }
    assert {name: COLUMNS.index(name) for name in places} == {
        name: place.value for name, place in places.items()
    }
    assert len(COLUMNS) == denoise_terms.COLUMNS.value
    terms = [f"{of}_{kind}" for of in ("prev", "extra") for kind in ("sample", "prediction")]
    assert [COLUMNS.index(name) for name in terms] == [5, 6, 15, 16]
    for of, start in (("prev", 5), ("extra", 15)):
        names = [f"{of}_output", *(f"{of}_history_{i}" for i in range(4))]
        assert [COLUMNS.index(name) for name in names] == list(range(start + 2, start + 7))


@pytest.mark.parametrize("threshold", ["none", "clip"])
@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, FP32) for shape in SHAPES), (SHAPES[1], BF16), (SHAPES[2], FP16)]
)
def test_every_term_at_every_level(shape, threshold, dtype):
    numbers = Numbers("cpu")
    sample = numbers.normal(shape, dtype)
    history = tuple(numbers.normal(shape, dtype) for _ in range(4))
    model_dtypes = itertools.cycle([dtype, BF16, FP32])
    for index in indices_in(shape):
        output, variance = numbers.normal((shape[0], 2, *shape[1:]), next(model_dtypes)).unbind(1)
        table = table_of_steps(numbers)
        rest = {"threshold": threshold}
        judge_step(sample, output, table, index, **rest)
        more = {"history": history[:1], "noise": numbers.normal(shape, FP16)}
        judge_step(sample, output, table, index, **more, **rest)
        more = {"history": history, "key": KEY, "variance": variance}
        judge_step(sample, output, table, index, **more, **rest)
        more = {"variance": variance.abs(), "variance_type": "learned", "want": False}
        more |= {"key": KEY, "sample_ids": numbers.ids(shape[0])}
        _, prediction, extra = judge_step(sample, output, table, index, **more, **rest)
        assert prediction.numel() == extra.numel() == 0


@pytest.mark.parametrize(
    ("threshold", "dtype"), [("none", FP16), ("clip", BF16), ("dynamic", FP32), ("dynamic", BF16)]
)
def test_guidance(threshold, dtype):
    numbers = Numbers("cpu")
    for shape in SHAPES:
        # Both halves of a batch, as samplers run a model.
        uncond, output = numbers.normal((2, *shape), dtype)
        sample = 3 * numbers.normal(shape)
        for index in indices_in(shape)[:2]:
            for rescale in (False, True):
                # Three numbers have no steady deviation.
                table = table_of_steps(numbers, rescale and sample[0].numel() > 3)
                more = {"uncond_output": uncond, "threshold": threshold, "key": KEY}
                judge_step(sample, output, table, index, **more)


def test_guidance_of_one_is_the_conditional_output():
    numbers = Numbers("cpu")
    sample, output, uncond = (numbers.normal((2, 37)) for _ in range(3))
    table = denoise_coefficients(prev_output=1.0, guidance=1.0)
    uncond[0, 3] = torch.inf
    rest = arguments_of(sample, output, table, torch.tensor(0), uncond_output=uncond)
    assert torch.equal(run("denoise_step", "triton", *rest)[0], output)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.995, 1.0])
def test_quantiles(ratio):
    """Exact, with equal values, in samples of one block and of several, and of one element."""
    numbers = Numbers("cpu")
    table = denoise_coefficients(prediction_sample=1.0, prev_prediction=1.0, clip=[torch.inf, 2.0])
    for shape in ((3, 1), (2, 2), (2, 37), (2, 2500)):
        for scale in (1.0, 1e4):
            for rounded in (False, True):
                sample = scale * numbers.normal(shape)
                sample = sample.round() if rounded else sample
                index = torch.tensor([i % 2 for i in range(shape[0])])
                more = {"threshold": "dynamic", "ratio": ratio}
                found = judge_step(sample, torch.zeros(shape), table, index, **more)[0]
                sizes = sample.double().abs().quantile(ratio, dim=1, keepdim=True).clamp(min=1)
                bound = torch.where(index[:, None] == 1, sizes.clamp(max=2), sizes)
                exact = sample.double().clamp(-bound, bound) / bound
                torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_numbers_that_are_none():
    """A NaN spoils its element; with a dynamic threshold its sample; infinities are the largest."""
    table = denoise_coefficients(prediction_sample=1.0, prev_prediction=1.0, clip=5.0)
    sample = Numbers("cpu").normal((4, 300))
    sample[0, 7], sample[1, 8], sample[2, 9] = torch.nan, torch.inf, -torch.inf
    for threshold in ("none", "clip", "dynamic"):
        arguments = arguments_of(
            sample, torch.zeros_like(sample), table, torch.tensor(0), threshold=threshold
        )
        found = run("denoise_step", "triton", *arguments)[0]
        expected = run("denoise_step", "reference", *arguments)[0]
        assert found[0].isnan().sum() == (300 if threshold == "dynamic" else 1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_a_coefficient_of_zero_leaves_its_term_out():
    numbers = Numbers("cpu")
    sample, bad = numbers.normal((2, 40)), torch.full((2, 40), torch.inf)
    table = denoise_coefficients(prev_sample=0.5, extra_sample=-2.0)
    more = {"uncond_output": bad, "history": (bad,) * 4, "noise": bad, "variance": bad}
    prev, prediction, extra = run(
        "denoise_step", "triton", *arguments_of(sample, bad, table, torch.tensor(0), **more)
    )
    assert torch.equal(prev, 0.5 * sample)
    assert (prediction == 0).all()
    assert torch.equal(extra, -2 * sample)


def test_writes_in_place():
    """Into the sample, or into an entry of its history, what it gives elsewhere."""
    numbers = Numbers("cpu")
    table = table_of_steps(numbers, rescale=True)
    for threshold in ("none", "dynamic"):
        sample, output, uncond, entry = (numbers.normal((2, 2500)) for _ in range(4))
        rest = arguments_of(
            sample,
            output,
            table,
            torch.tensor([0, 3]),
            uncond_output=uncond,
            history=(entry,),
            key=KEY,
            threshold=threshold,
            want=False,
        )
        expected = denoise_step(*rest)[0]
        for place in (sample, entry):
            before = place.clone()
            assert denoise_step(*rest, [place])[0] is place
            assert torch.equal(place, expected)
            place.copy_(before)


def test_nothing():
    table = denoise_coefficients(prev_sample=1.0)
    for shape in ((0, 4), (3, 0)):
        x = torch.empty(shape)
        results = run("denoise_step", "triton", *arguments_of(x, x, table, torch.tensor(0)))
        assert [tuple(t.shape) for t in results] == [shape] * 3
