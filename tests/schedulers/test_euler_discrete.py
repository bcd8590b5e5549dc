from __future__ import annotations

from typing import Any

import pytest
from _loops import assert_is_diffusers, ours, theirs

NAME = "EulerDiscreteScheduler"
STEPS = (1, 2, 3, 7, 50)


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
