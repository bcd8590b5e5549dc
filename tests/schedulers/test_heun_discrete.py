from __future__ import annotations

from typing import Any

import pytest
import torch
from _loops import assert_is_diffusers, in_float64, ours, run, theirs
from _peers import BOUND, STEPS, distance, start, toy_model

from vqkernels import schedulers

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "HeunDiscreteScheduler"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "exp"])
def test_spacings_predictions_and_betas(betas: str, kind: str, spacing: str, steps: int) -> None:
    config = {"beta_schedule": betas, "prediction_type": kind, "timestep_spacing": spacing}
    assert_is_diffusers(NAME, config, steps)


@pytest.mark.parametrize("steps", [1, 3, 7, 50])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_predictions_of_the_data(spacing: str, steps: int) -> None:
    config = {
        "beta_schedule": "scaled_linear",
        "prediction_type": "sample",
        "timestep_spacing": spacing,
    }
    assert_is_diffusers(NAME, config, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_cosine_schedule(kind: str, steps: int) -> None:
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": kind}
    assert_is_diffusers(NAME, {**config, "timestep_spacing": "leading"}, steps)


@pytest.mark.parametrize(("kind", "steps"), [("v_prediction", 50), ("sample", 7)])
def test_levels_that_a_float32_sample_hardly_holds(kind: str, steps: int) -> None:
    """From the cosine schedule's last timestep, sigma = 2e4, a step of float32 is 2e-3 of data."""
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": kind}
    schedule = {"num_inference_steps": steps}
    peer = theirs(NAME, config, **schedule)
    x = start() * float(peer.init_noise_sigma)
    _, unrounded = in_float64(NAME, config, schedule, x)
    error = distance(run(ours(NAME, config, **schedule), x), unrounded)
    assert error < distance(run(peer, x), unrounded) / 100


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "config",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "prediction_type": "v_prediction"},
        {"use_beta_sigmas": True},
        {"steps_offset": 1, "timestep_spacing": "leading"},
        {"trained_betas": [0.001 * (i + 1) for i in range(20)], "num_train_timesteps": 20},
    ],
    ids=lambda config: "-".join(map(str, config)),
)
def test_other_options(config: dict[str, Any], steps: int) -> None:
    assert_is_diffusers(NAME, config, min(steps, config.get("num_train_timesteps", steps)))


@pytest.mark.parametrize("steps", [1, 3, 7, 50])
@pytest.mark.parametrize(
    "config",
    [
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.3, "prediction_type": "v_prediction"},
    ],
)
def test_clipping(config: dict[str, Any], steps: int) -> None:
    assert_is_diffusers(NAME, config, steps)


@pytest.mark.parametrize(
    "schedule",
    [
        {"timesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]},
        {"timesteps": [700.5, 300.25, 0.125]},
        {"num_inference_steps": 7, "num_train_timesteps": 500},
    ],
)
def test_schedules_that_a_caller_gives(schedule: dict[str, Any]) -> None:
    assert_is_diffusers(NAME, {}, schedule)


def test_thresholds_of_another_class_are_not_its_own() -> None:
    """They stay in the config for the class that has them."""
    other = schedulers.DDIMScheduler(thresholding=True, clip_sample=False)
    scheduler = schedulers.HeunDiscreteScheduler.from_config(other)
    scheduler.set_timesteps(3)
    assert scheduler.config.thresholding
    peer = theirs(NAME, {}, num_inference_steps=3)
    x = start() * float(peer.init_noise_sigma)
    assert distance(run(scheduler, x), run(peer, x)) < BOUND


def test_before_set_timesteps_the_schedule_is_that_of_training() -> None:
    peer = theirs(NAME, {}, num_inference_steps=1000)
    for numerics in ("exact", "diffusers"):
        fresh = ours(NAME, {}, numerics=numerics, laid_out=False)
        assert torch.equal(fresh.timesteps, peer.timesteps)
        torch.testing.assert_close(fresh.sigmas, peer.sigmas, rtol=1e-4, atol=0)


def test_a_loop_may_begin_at_a_first_call_only() -> None:
    scheduler = ours(NAME, {}, num_inference_steps=5)
    x, t = start(), scheduler.timesteps[4]
    scheduler.set_begin_index(4)
    assert scheduler.state_in_first_order
    x = scheduler.step(toy_model(x, t), t, x).prev_sample
    assert not scheduler.state_in_first_order
    x = scheduler.step(toy_model(x, t), t, x).prev_sample
    assert scheduler.state_in_first_order

    for numerics in ("exact", "diffusers"):
        scheduler = ours(NAME, {}, numerics=numerics, num_inference_steps=5)
        scheduler.set_begin_index(3)
        with pytest.raises(ValueError, match="begin_index must be even"):
            scheduler.step(toy_model(x, t), t, x)


def test_a_loop_that_was_left_halfway_leaves_nothing_behind() -> None:
    scheduler = ours(NAME, {}, num_inference_steps=5)
    x = start() * 10
    expected = run(scheduler, x)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0]
    scheduler.step(toy_model(x, t), t, x)
    scheduler.set_timesteps(5)
    assert torch.equal(run(scheduler, x), expected)


@pytest.mark.parametrize(
    ("config", "schedule", "message"),
    [
        ({}, {}, "give num_inference_steps or timesteps, got neither"),
        ({}, {"num_inference_steps": 1, "timesteps": [1]}, "got both"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps must lie in"),
        ({}, {"timesteps": [1, 5]}, "timesteps must descend"),
        ({}, {"timesteps": [2000]}, r"timesteps .* must lie in"),
        ({"use_beta_sigmas": True}, {"timesteps": [5, 1]}, "with use_beta_sigmas=True"),
    ],
)
def test_schedules_that_cannot_be(
    config: dict[str, Any], schedule: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours(NAME, config, **schedule)
