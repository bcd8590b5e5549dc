from __future__ import annotations

import pytest
import torch
from _loops import assert_is_diffusers, ours, run, theirs
from _peers import STEPS, start

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "EulerAncestralDiscreteScheduler"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_spacings_predictions_and_betas(betas: str, kind: str, spacing: str, steps: int) -> None:
    config = {"beta_schedule": betas, "prediction_type": kind, "timestep_spacing": spacing}
    assert_is_diffusers(NAME, config, steps, seeded=True)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_zero_terminal_snr(kind: str, steps: int) -> None:
    config = {"rescale_betas_zero_snr": True, "prediction_type": kind, "steps_offset": 1}
    assert_is_diffusers(NAME, config, steps, seeded=True)


def test_a_root_of_a_negative_rounding_error() -> None:
    """down = sqrt(s'^2 - up^2) is 0 / 0 of rounding where s' << s; it is s'^2 / s."""
    config = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    x = start() * 100
    schedule = {"num_inference_steps": 3}
    assert run(theirs(NAME, config, **schedule), x, seeded=True).isnan().all()
    assert run(ours(NAME, config, numerics="diffusers", **schedule), x, seeded=True).isnan().all()
    fixed = run(ours(NAME, config, **schedule), x, seeded=True)
    assert fixed.isfinite().all()
    rounded = run(ours(NAME, config, numerics="diffusers", compat=(), **schedule), x, seeded=True)
    torch.testing.assert_close(rounded, fixed, rtol=1e-2, atol=1e-2)


def test_the_data_may_be_predicted_though_diffusers_refuses() -> None:
    with pytest.raises(NotImplementedError):
        run(theirs(NAME, {"prediction_type": "sample"}, num_inference_steps=3), start())
    scheduler = ours(NAME, {"prediction_type": "sample"}, num_inference_steps=7)
    x, data = start() * 100, start(seed=9)
    for t in scheduler.timesteps:
        x = scheduler.step(data, t, x, seed=1).prev_sample
    torch.testing.assert_close(x, data, rtol=0, atol=1e-5)


def test_the_noise_is_that_of_ancestors() -> None:
    """A model that knows the data leaves data + sigma' z at each step."""
    scheduler = ours(NAME, {"prediction_type": "sample"}, num_inference_steps=20)
    data = torch.zeros(4, 3, 32, 32)
    x = torch.randn(data.shape) * float(scheduler.sigmas[0])
    for i, t in enumerate(scheduler.timesteps[:-1]):
        x = scheduler.step(data, t, x, seed=1).prev_sample
        assert float(x.std()) == pytest.approx(float(scheduler.sigmas[i + 1]), rel=0.03)
