from __future__ import annotations

from typing import Any

import pytest
import torch
from _loops import assert_is_diffusers, ours, theirs
from _peers import STEPS, start, toy_model

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "EulerDiscreteScheduler"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_spacings_predictions_and_betas(betas: str, kind: str, spacing: str, steps: int) -> None:
    config = {"beta_schedule": betas, "prediction_type": kind, "timestep_spacing": spacing}
    assert_is_diffusers(NAME, config, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("respacing", ["karras", "exponential", "beta"])
def test_levels_spaced_otherwise(respacing: str, kind: str, steps: int) -> None:
    config = {
        "beta_schedule": "scaled_linear",
        f"use_{respacing}_sigmas": True,
        "prediction_type": kind,
    }
    assert_is_diffusers(NAME, config, steps)
    ends = {"sigma_min": 0.05, "sigma_max": 9.0, "timestep_spacing": "leading"}
    assert_is_diffusers(NAME, {**config, **ends}, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "config",
    [
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear"},
        {"interpolation_type": "log_linear", "use_karras_sigmas": True},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"timestep_type": "continuous"},
        {"steps_offset": 1, "timestep_spacing": "leading"},
        {"prediction_type": "original_sample"},
        {"trained_betas": [0.001 * (i + 1) for i in range(20)], "num_train_timesteps": 20},
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ],
    ids=lambda config: "-".join(map(str, config)),
)
def test_other_options(config: dict[str, Any], steps: int) -> None:
    assert_is_diffusers(NAME, config, min(steps, config.get("num_train_timesteps", steps)))


def test_a_trailing_timestep_too_many() -> None:
    config = {"timestep_spacing": "trailing"}
    assert_is_diffusers(NAME, config, 61)
    assert_is_diffusers(NAME, {**config, "use_karras_sigmas": True}, 61)
    assert_is_diffusers(NAME, {**config, "interpolation_type": "log_linear"}, 61)
    assert len(theirs(NAME, config, num_inference_steps=61).timesteps) == 62
    assert len(ours(NAME, config, num_inference_steps=61).timesteps) == 61


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 5.0},
        {"s_churn": 100.0, "s_noise": 1.003},
        {"s_churn": 3.0, "s_tmin": 0.4, "s_tmax": 6.0, "s_noise": 0.9},
        {"s_churn": 0.0, "s_tmin": 0.4},
    ],
)
def test_churn(churn: dict[str, float], kind: str) -> None:
    config = {"beta_schedule": "scaled_linear", "prediction_type": kind}
    for steps in (1, 3, 20):
        assert_is_diffusers(NAME, config, steps, seeded=True, **churn)


def test_churn_may_change_from_step_to_step() -> None:
    def loop_of(scheduler: Any) -> torch.Tensor:
        x, generator = start() * 10, torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps):
            output = toy_model(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(
                output, t, x, s_churn=float(i % 3), s_noise=1 + i / 10, generator=generator
            ).prev_sample
        return x

    expected = loop_of(theirs(NAME, {}, num_inference_steps=7))
    torch.testing.assert_close(
        loop_of(ours(NAME, {}, num_inference_steps=7)), expected, rtol=1e-5, atol=1e-5
    )
    rounded = ours(NAME, {}, numerics="diffusers", num_inference_steps=7)
    assert torch.equal(loop_of(rounded), expected)


@pytest.mark.parametrize(
    "schedule",
    [
        {"timesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]},
        {"timesteps": [700.5, 300.25, 0.125]},
        {"sigmas": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]},
        {"sigmas": [3.0, 1.0, 0.25]},
        {"sigmas": [700.0, 0.0]},
    ],
    ids=lambda schedule: f"{next(iter(schedule))}-{len(next(iter(schedule.values())))}",
)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_schedules_that_a_caller_gives(kind: str, schedule: dict[str, Any]) -> None:
    assert_is_diffusers(NAME, {"prediction_type": kind}, schedule)


def test_a_tensor_of_sigmas() -> None:
    listed = ours(NAME, {}, sigmas=[3.0, 1.0, 0.0])
    given = ours(NAME, {}, sigmas=torch.tensor([3.0, 1.0, 0.0]))
    assert torch.equal(given.coefficients, listed.coefficients)
    assert given.num_inference_steps == 2


def test_log_linear_levels() -> None:
    """diffusers spaces them over the whole schedule and never reaches 0; fixed, they are levels
    of the timesteps, which a linear interpolation meets at whole ones."""
    config = {"interpolation_type": "log_linear", "timestep_spacing": "leading"}
    peer = theirs(NAME, config, num_inference_steps=10)
    assert len(peer.sigmas) == len(peer.timesteps) + 2
    assert peer.sigmas[len(peer.timesteps)] > 0
    compatible = ours(NAME, config, compat=("log_linear_levels",), num_inference_steps=10)
    assert len(compatible.sigmas) == len(peer.sigmas)  # test_other_options compares the values

    fixed = ours(NAME, config, num_inference_steps=10)
    linear = ours(NAME, {"timestep_spacing": "leading"}, num_inference_steps=10)
    torch.testing.assert_close(fixed.sigmas, linear.sigmas, rtol=1e-6, atol=0)
    between = ours(NAME, config, timesteps=[10.5])
    ends = ours(NAME, config, timesteps=[11, 10]).sigmas
    torch.testing.assert_close(between.sigmas[0], (ends[0] * ends[1]).sqrt())


def test_get_velocity() -> None:
    """diffusers reads alphas_cumprod at a timestep's place in the schedule, not at the timestep."""
    config = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    x, noise = start(), start(seed=6)
    times = torch.tensor([999.0, 0.0])
    peer = theirs(NAME, config, num_inference_steps=1000)
    wrong = peer.get_velocity(x, noise, times)
    rounded = ours(NAME, config, numerics="diffusers", num_inference_steps=1000)
    assert torch.equal(rounded.get_velocity(x, noise, times), wrong)
    compatible = ours(NAME, config, compat=("velocity_index",), num_inference_steps=1000)
    torch.testing.assert_close(compatible.get_velocity(x, noise, times), wrong)

    kept = peer.alphas_cumprod[[999, 0]].double()[:, None, None, None]
    right = kept.sqrt() * noise - (1 - kept).sqrt() * x
    assert (wrong - right).abs().max() > 1
    for numerics in ("exact", "diffusers"):
        fixed = ours(NAME, config, numerics=numerics, compat=(), num_inference_steps=1000)
        velocity = fixed.get_velocity(x, noise, times)
        torch.testing.assert_close(velocity, right.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="got the integer"):
        fixed.get_velocity(x, noise, times.long())


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({}, "give one of num_inference_steps, timesteps, sigmas, got none"),
        (
            {"num_inference_steps": 2, "sigmas": [1.0, 0.0]},
            "got num_inference_steps and sigmas",
        ),
        ({"num_inference_steps": 0}, r"num_inference_steps must lie in \[1, .* = 1000\], got 0"),
        ({"num_inference_steps": -3}, "got -3"),
        ({"num_inference_steps": 1001}, "got 1001"),
        ({"sigmas": [1.0]}, r"sigmas must hold positive levels and one more .* got \[1.0\]"),
        ({"sigmas": [1.0, 0.0, 0.0]}, "sigmas must hold positive levels"),
        ({"sigmas": [1.0, 2.0, 0.0]}, "sigmas must descend"),
        ({"sigmas": [float("nan"), 0.0]}, "sigmas must be finite"),
        ({"timesteps": [1000, 1]}, r"timesteps .* must lie in \[0, .* = 999\], got 1000"),
        ({"timesteps": [10, -1]}, "timesteps must not be negative"),
    ],
)
def test_schedules_that_cannot_be(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(NAME, {}, **schedule)


def test_an_offset_out_of_the_schedule() -> None:
    config = {"timestep_spacing": "leading", "steps_offset": 300}
    with pytest.raises(ValueError, match=r"timesteps .*by steps_offset\) must lie in .*, got 1100"):
        ours(NAME, config, num_inference_steps=5)


def test_timesteps_do_not_go_with_levels_spaced_otherwise() -> None:
    with pytest.raises(ValueError, match="with use_karras_sigmas=True"):
        ours(NAME, {"use_karras_sigmas": True}, timesteps=[3, 1])
    continuous = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match="with timestep_type='continuous'"):
        ours(NAME, continuous, timesteps=[3, 1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"interpolation_type": "cubic"}, "interpolation_type must be .*'log_linear'.*'cubic'"),
        ({"timestep_type": "both"}, "timestep_type must be"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type must be"),
        ({"prediction_type": "flow_prediction"}, "prediction_type must be"),
        ({"beta_schedule": "cubic"}, "beta_schedule must be"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of use_karras_sigmas"),
    ],
)
def test_configs_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(NAME, config, num_inference_steps=3)
