from __future__ import annotations

from typing import Any

import pytest
import torch
from _loops import assert_is_diffusers, ours, theirs
from _peers import STEPS, start, toy_model

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "FlowMatchHeunDiscreteScheduler"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"shift": 0.5, "num_train_timesteps": 100}])
def test_schedules(config: dict[str, Any], steps: int) -> None:
    assert_is_diffusers(NAME, config, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 5.0},
        {"s_churn": 100.0, "s_noise": 1.003},
        {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 0.8, "s_noise": 0.9},
    ],
)
def test_churn(churn: dict[str, float], steps: int) -> None:
    assert_is_diffusers(NAME, {"shift": 2.0}, steps, seeded=True, **churn)


def test_the_double_shift() -> None:
    config = {"shift": 3.0, "num_train_timesteps": 20}
    trained = theirs(NAME, config, laid_out=False).sigmas
    twice = theirs(NAME, config, num_inference_steps=20).sigmas
    assert (twice[:-1:2] - trained).abs().max() > 0.1
    compatible = ours(NAME, config, compat=("double_shift",), num_inference_steps=20)
    torch.testing.assert_close(compatible.sigmas, twice, rtol=1e-6, atol=0)
    for numerics in ("exact", "diffusers"):
        fixed = ours(NAME, config, numerics=numerics, compat=(), num_inference_steps=20)
        torch.testing.assert_close(fixed.sigmas[:-1:2], trained, rtol=1e-6, atol=0)


def test_a_loop_may_begin_at_a_first_call_only() -> None:
    scheduler = ours(NAME, {}, num_inference_steps=5)
    scheduler.set_begin_index(1)
    x, t = start(), scheduler.timesteps[1]
    with pytest.raises(ValueError, match=r"begin_index must be even.* got 1"):
        scheduler.step(toy_model(x, t), t, x)


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        ({}, 0, "num_inference_steps must lie in"),
        ({}, 1001, "num_inference_steps must lie in"),
        ({"shift": -1.0}, 3, "shift must be positive, got -1"),
    ],
)
def test_arguments_that_cannot_be(config: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(NAME, config, num_inference_steps=steps)


def test_second_order() -> None:
    """Of x' = cos(5 t) x, the error falls by 4 where the steps double."""

    def error(steps: int) -> float:
        scheduler = ours(NAME, {}, num_inference_steps=steps)
        x = torch.ones(1, 1, dtype=torch.float64)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.cos(t.double() / 200) * x, t, x).prev_sample
        return abs(float(x) - float(torch.exp(-torch.sin(torch.tensor(5.0)) / 5)))

    assert error(20) / error(40) == pytest.approx(4, rel=0.5)
