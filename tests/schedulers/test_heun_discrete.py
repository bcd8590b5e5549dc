from __future__ import annotations

from typing import Any

import pytest
import torch
from _loops import assert_is_diffusers, in_float64, ours, run, theirs
from _peers import start, toy_model

NAME = "HeunDiscreteScheduler"
STEPS = (1, 2, 3, 7, 50)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "exp"])
def test_spacings_predictions_and_betas(betas: str, kind: str, spacing: str, steps: int) -> None:
    config = {"beta_schedule": betas, "prediction_type": kind, "timestep_spacing": spacing}
    assert_is_diffusers(NAME, config, steps)
