from __future__ import annotations

from typing import Any

import pytest
import torch
from _loops import assert_is_diffusers, ours, run, theirs
from _peers import STEPS, start, toy_model

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "EDMEulerScheduler"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_spacings_and_predictions(spacing: str, kind: str, final: str, steps: int) -> None:
    config = {"sigma_schedule": spacing, "prediction_type": kind, "final_sigmas_type": final}
    assert_is_diffusers(NAME, config, steps)


@pytest.mark.parametrize("steps", STEPS)
def test_other_options(steps: int) -> None:
    ends = {"sigma_min": 0.02, "sigma_max": 200.0, "sigma_data": 1.0}
    assert_is_diffusers(NAME, {**ends, "rho": 5.0, "num_train_timesteps": 100}, steps)
    assert_is_diffusers(NAME, {**ends, "sigma_schedule": "exponential"}, steps)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 5.0},
        {"s_churn": 100.0, "s_noise": 1.003},
        {"s_churn": 3.0, "s_tmin": 0.4, "s_tmax": 6.0, "s_noise": 0.9},
    ],
)
def test_churn(churn: dict[str, float], kind: str) -> None:
    for steps in (1, 3, 20):
        assert_is_diffusers(NAME, {"prediction_type": kind}, steps, seeded=True, **churn)


def test_the_training_schedule() -> None:
    peer = theirs(NAME, {}, laid_out=False)
    for numerics in ("exact", "diffusers"):
        fresh = ours(NAME, {}, numerics=numerics, laid_out=False)
        torch.testing.assert_close(fresh.sigmas, peer.sigmas, rtol=1e-6, atol=0)
        torch.testing.assert_close(fresh.timesteps, peer.timesteps, rtol=1e-6, atol=1e-6)


def test_data_that_is_known() -> None:
    x, data = start() * 80, start(seed=8)
    for churn in (0.0, 7.0):

        def step(scheduler: Any, churn: float = churn) -> Any:
            t = scheduler.timesteps[2]
            generator = torch.Generator().manual_seed(0)
            return scheduler.step(
                x, t, x, s_churn=churn, generator=generator, pred_original_sample=data
            )

        expected = step(theirs(NAME, {}, num_inference_steps=5))
        rounded = step(ours(NAME, {}, numerics="diffusers", num_inference_steps=5))
        exact = step(ours(NAME, {}, num_inference_steps=5))
        assert torch.equal(rounded.prev_sample, expected.prev_sample)
        torch.testing.assert_close(exact.prev_sample, expected.prev_sample, rtol=1e-5, atol=1e-5)
        assert exact.pred_original_sample is data


def test_custom_sigmas() -> None:
    """diffusers takes them for places between sigma_max and sigma_min."""
    given = torch.tensor([0.0, 0.25, 1.0])
    assert_is_diffusers(NAME, {}, {"sigmas": given})
    levels = torch.tensor([80.0, 5.0, 0.5])
    assert theirs(NAME, {}, sigmas=levels).sigmas.isnan().any() or not torch.allclose(
        theirs(NAME, {}, sigmas=levels).sigmas[:-1], levels
    )
    for numerics in ("exact", "diffusers"):
        scheduler = ours(NAME, {}, numerics=numerics, compat=(), sigmas=levels.tolist())
        assert torch.equal(scheduler.sigmas, torch.tensor([80.0, 5.0, 0.5, 0.0]))
        torch.testing.assert_close(scheduler.timesteps, levels.log() / 4)
        assert run(scheduler, start() * 80).isfinite().all()


def test_preconditioning() -> None:
    peer, mine = (make(NAME, {}, num_inference_steps=5) for make in (theirs, ours))
    x, output = start(), start(seed=6)
    for sigma in (0.3, torch.tensor(0.3)):
        assert torch.equal(
            mine.precondition_outputs(x, output, sigma), peer.precondition_outputs(x, output, sigma)
        )
        assert torch.equal(mine.precondition_inputs(x, sigma), peer.precondition_inputs(x, sigma))
        assert torch.equal(mine.precondition_noise(sigma), peer.precondition_noise(sigma))


@pytest.mark.parametrize(
    ("config", "schedule", "message"),
    [
        ({"sigma_schedule": "beta"}, {}, "sigma_schedule must be"),
        ({"prediction_type": "sample"}, {}, "prediction_type must be"),
        ({"final_sigmas_type": "one"}, {}, "final_sigmas_type must be"),
        ({"sigma_min": 0.0}, {}, "sigma_min must be positive"),
        ({}, {}, "num_inference_steps must be an int, got None"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps must lie in"),
        ({}, {"sigmas": [1.0, 2.0]}, "sigmas must descend"),
        ({}, {"sigmas": [1.0, 0.0]}, "sigmas must be positive"),
        ({}, {"sigmas": [1.0, float("nan")]}, "sigmas must be finite"),
        ({}, {"sigmas": [1.0], "num_inference_steps": 2}, "num_inference_steps must be None or"),
    ],
)
def test_arguments_that_cannot_be(
    config: dict[str, Any], schedule: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours(NAME, config, **schedule)


def test_known_data_takes_no_guidance() -> None:
    scheduler = ours(NAME, {}, num_inference_steps=5)
    x, t = start(), scheduler.timesteps[0]
    with pytest.raises(ValueError, match="uncond_output must be None"):
        scheduler.step(toy_model(x, t), t, x, pred_original_sample=x, uncond_output=x)
