"""LCMScheduler against diffusers over whole loops, and where it means to differ."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch
from _peers import compare, distance, generator, loop, start
from torch import Tensor

from vqkernels.schedulers import LCMScheduler

pytestmark = pytest.mark.usefixtures("one_thread")


def check(layout: dict[str, Any], **arguments: Any) -> None:
    def run(scheduler: Any, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timesteps outside of the distillation
            scheduler.set_timesteps(**layout)
        return loop(scheduler, x, generator=generator())

    compare(LCMScheduler, diffusers.LCMScheduler, arguments, run)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_loops_follow_diffusers(beta_schedule: str, prediction_type: str) -> None:
    kinds = {"beta_schedule": beta_schedule, "prediction_type": prediction_type}
    for steps in (1, 2, 3, 4, 7, 50):
        # Without a bound on the prediction a model of noise is multiplied by up to 150 a step.
        check({"num_inference_steps": steps}, clip_sample=True, **kinds)
    check({"num_inference_steps": 4}, thresholding=True, sample_max_value=2.0, **kinds)
    if prediction_type != "epsilon":
        check({"num_inference_steps": 4}, **kinds)


@pytest.mark.parametrize(
    "layout",
    [
        {"num_inference_steps": 4, "strength": 0.5},
        {"num_inference_steps": 3, "original_inference_steps": 30},
        {"num_inference_steps": 8, "original_inference_steps": 100, "strength": 0.31},
        {"timesteps": [999, 759, 499, 259]},
        {"timesteps": [999, 759, 499, 259], "strength": 0.6},
        {"timesteps": [900, 30, 0]},
    ],
)
def test_schedules(layout: dict[str, Any]) -> None:
    check(layout, prediction_type="v_prediction")
    check(layout, prediction_type="sample", timestep_scaling=3.0, clip_sample=True)


def test_zero_terminal_snr_and_betas() -> None:
    four = {"num_inference_steps": 4}
    check(four, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    check(four, num_train_timesteps=100, trained_betas=[0.001 * (i + 1) for i in range(100)])


def test_timesteps_as_numbers() -> None:
    """A number's scalings are computed in float64 by diffusers, a tensor's in float32."""
    x, output = start(), start(seed=6)
    for numerics in ("exact", "diffusers"):
        ours, theirs = LCMScheduler(numerics=numerics), diffusers.LCMScheduler()
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(4)
        found, expected = (
            scheduler.step(output, 999, x, generator()) for scheduler in (ours, theirs)
        )
        assert distance(found.prev_sample, expected.prev_sample) < 1e-5
        assert distance(found.denoised, expected.denoised) < 1e-5
        assert numerics == "exact" or torch.equal(found.denoised, expected.denoised)


def test_the_fault_of_noise_after_the_last_step() -> None:
    """Custom timesteps cut by `strength` end with the denoised sample, not with noise."""
    x = start()
    layout = {"timesteps": [999, 759, 499, 259], "strength": 0.5}
    results = {}
    for name, scheduler in {
        "fixed": LCMScheduler(prediction_type="v_prediction"),
        "faulty": LCMScheduler(prediction_type="v_prediction", compat=("final_step_noise",)),
        "theirs": diffusers.LCMScheduler(prediction_type="v_prediction"),
    }.items():
        scheduler.set_timesteps(**layout)
        assert scheduler.timesteps.tolist() == [499, 259]
        source = generator()
        first = scheduler.step(x, 499, x, source)
        results[name] = scheduler.step(x, 259, first.prev_sample, source)
    assert torch.equal(results["fixed"].prev_sample, results["fixed"].denoised)
    assert distance(results["theirs"].prev_sample, results["theirs"].denoised) > 0.1
    assert distance(results["faulty"].prev_sample, results["theirs"].prev_sample) < 1e-5


def test_it_counts_from_where_it_begins() -> None:
    x = start()
    scheduler = LCMScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None
    assert scheduler.begin_index is None
    scheduler.step(x, scheduler.timesteps[2], x, seed=1)
    assert scheduler.step_index == 3
    scheduler.step(x, 123, x, seed=1)  # as in diffusers, only the first timestep tells the place
    with pytest.raises(ValueError, match="the schedule has 4 steps, got one more"):
        scheduler.step(x, 123, x, seed=1)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    scheduler.step(x, 123, x, seed=1)
    assert (scheduler.begin_index, scheduler.step_index) == (1, 2)


def test_keyed_noise_is_a_samples_own() -> None:
    x = start((4, 3, 8, 8))
    scheduler = LCMScheduler(clip_sample=True)

    def run(x: Tensor, ids: Tensor) -> Tensor:
        scheduler.set_timesteps(4)
        return loop(scheduler, x, seed=7, sample_ids=ids)

    ids = torch.tensor([3, 1, 4, 15])
    whole = run(x, ids)
    assert torch.equal(torch.cat([run(x[:1], ids[:1]), run(x[1:], ids[1:])]), whole)


def test_bad_arguments() -> None:
    scheduler = LCMScheduler()
    for layout, message in (
        ({}, "got neither"),
        ({"num_inference_steps": 4, "timesteps": [3]}, "got both"),
        ({"num_inference_steps": 51}, "must be at most 50"),
        ({"num_inference_steps": 30, "strength": 0.5}, "must be at most 25"),
        ({"num_inference_steps": 0}, "num_inference_steps must lie in"),
        ({"num_inference_steps": 4, "strength": 0}, r"strength must lie in \(0, 1\], got 0"),
        ({"num_inference_steps": 4, "original_inference_steps": 2000}, "original_inference_steps"),
        ({"timesteps": [259], "strength": 0.5}, "strength must leave a timestep"),
        ({"timesteps": [259, 499]}, "descending"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(**layout)
    with pytest.warns(UserWarning, match=r"not distilled on the timesteps \[500\]"):
        scheduler.set_timesteps(timesteps=[999, 500])
