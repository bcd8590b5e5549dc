from __future__ import annotations

from typing import Any

import pytest
import torch
from _loops import assert_is_diffusers, ours, theirs
from _peers import STEPS, start, toy_model

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift": 3.0},
        {"shift": 0.5, "num_train_timesteps": 100},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "shift": 2.0},
        {"use_beta_sigmas": True},
        {"invert_sigmas": True},
        {"invert_sigmas": True, "shift": 3.0},
    ],
    ids=lambda config: "-".join(map(str, config)) or "none",
)
def test_static_schedules(config: dict[str, Any], stochastic: bool, steps: int) -> None:
    config = {**config, "stochastic_sampling": stochastic}
    assert_is_diffusers(NAME, config, steps, seeded=stochastic)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("mu", [0.25, 1.15])
@pytest.mark.parametrize("options", [{}, {"use_beta_sigmas": True}, {"invert_sigmas": True}])
def test_dynamic_shifts(options: dict[str, Any], mu: float, kind: str, steps: int) -> None:
    config = {"use_dynamic_shifting": True, "time_shift_type": kind, **options}
    assert_is_diffusers(NAME, config, {"num_inference_steps": steps, "mu": mu})


@pytest.mark.parametrize("steps", [2, 3, 7, 50])
@pytest.mark.parametrize(
    "config", [{"shift": 2.0}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}]
)
def test_terminal_shifts(config: dict[str, Any], steps: int) -> None:
    config = {**config, "shift_terminal": 0.1}
    assert_is_diffusers(NAME, config, {"num_inference_steps": steps, "mu": 0.8})


@pytest.mark.parametrize(
    "config",
    [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"invert_sigmas": True}],
    ids=lambda config: "-".join(map(str, config)) or "none",
)
@pytest.mark.parametrize(
    "schedule",
    [
        {"sigmas": [1.0, 0.7, 0.31, 0.02]},
        {"sigmas": [1.0, 0.5, 0.0]},
        {"timesteps": [1000.0, 800.0, 333.3]},
        {"timesteps": [900.0, 500.0], "sigmas": [0.8, 0.25]},
        {"num_inference_steps": 2, "timesteps": [900.0, 500.0], "sigmas": [0.8, 0.25]},
    ],
    ids=lambda schedule: "-".join(schedule),
)
def test_schedules_that_a_caller_gives(schedule: dict[str, Any], config: dict[str, Any]) -> None:
    assert_is_diffusers(NAME, config, {"mu": 0.9, **schedule})


def test_the_double_shift() -> None:
    """Levels of n = T steps are the training schedule's, which is shifted once."""
    config = {"shift": 3.0, "num_train_timesteps": 20}
    trained = theirs(NAME, config, laid_out=False).sigmas
    twice = theirs(NAME, config, num_inference_steps=20).sigmas[:-1]
    assert (twice - trained).abs().max() > 0.1
    compatible = ours(NAME, config, compat=("double_shift",), num_inference_steps=20)
    torch.testing.assert_close(compatible.sigmas[:-1], twice, rtol=1e-6, atol=0)
    for numerics in ("exact", "diffusers"):
        fixed = ours(NAME, config, numerics=numerics, compat=(), num_inference_steps=20)
        torch.testing.assert_close(fixed.sigmas[:-1], trained, rtol=1e-6, atol=0)


def test_a_terminal_shift_of_one_step() -> None:
    """diffusers divides 0 by 0."""
    config = {"shift_terminal": 0.1}
    assert theirs(NAME, config, num_inference_steps=1).sigmas[0].isnan()
    rounded = ours(NAME, config, numerics="diffusers", num_inference_steps=1)
    assert rounded.sigmas[0].isnan()
    for numerics in ("exact", "diffusers"):
        fixed = ours(NAME, config, numerics=numerics, compat=(), num_inference_steps=1)
        assert fixed.sigmas.tolist() == [1.0, 0.0]


def test_set_shift() -> None:
    peer, mine = (make(NAME, {}, num_inference_steps=5) for make in (theirs, ours))
    for scheduler in (peer, mine):
        scheduler.set_shift(2.5)
        scheduler.set_timesteps(7)
    assert mine.shift == peer.shift == 2.5
    torch.testing.assert_close(mine.sigmas, peer.sigmas, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        mine.set_shift(0)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("config", [{}, {"shift": 3.0}])
def test_tokens_with_timesteps_of_their_own(config: dict[str, Any], stochastic: bool) -> None:
    config = {**config, "stochastic_sampling": stochastic}
    x = start((2, 6, 8))

    def tokens_of(scheduler: Any) -> torch.Tensor:
        """Half of the tokens of a sample follow the loop, others are ahead, one is done."""
        sample, generator = x, torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps):
            times = t * torch.linspace(0, 1.5, 12).clamp(max=1).view(2, 6)
            times[0, 3] = scheduler.timesteps[min(i + 2, len(scheduler.timesteps) - 1)]
            output = toy_model(sample, t)
            sample = scheduler.step(
                output, t, sample, per_token_timesteps=times, generator=generator
            ).prev_sample
            assert sample.dtype == torch.float32
        return sample

    expected = tokens_of(theirs(NAME, config, num_inference_steps=6))
    rounded = ours(NAME, config, numerics="diffusers", num_inference_steps=6)
    assert torch.equal(tokens_of(rounded), expected)
    exact = ours(NAME, config, compat=("double_shift",), num_inference_steps=6)
    torch.testing.assert_close(tokens_of(exact), expected, rtol=1e-5, atol=1e-5)


def test_tokens_take_no_guidance() -> None:
    scheduler, x = ours(NAME, {}, num_inference_steps=3), start((2, 6, 8))
    t = scheduler.timesteps[0]
    with pytest.raises(ValueError, match="uncond_output must be None with per_token_timesteps"):
        scheduler.step(x, t, x, per_token_timesteps=t.expand(2, 6), uncond_output=x)


def test_keyed_noise_of_tokens_is_the_samples() -> None:
    config = {"stochastic_sampling": True}
    x, output = start((3, 6, 8)), start((3, 6, 8), seed=6)
    times = torch.linspace(100, 900, 18).view(3, 6)
    scheduler = ours(NAME, config, num_inference_steps=6)

    def step(part: slice) -> torch.Tensor:
        scheduler.set_begin_index(2)
        scheduler._step_index = None
        return scheduler.step(
            output[part],
            scheduler.timesteps[2],
            x[part],
            per_token_timesteps=times[part],
            seed=4,
            sample_ids=torch.arange(3)[part],
        ).prev_sample

    whole = step(slice(None))
    assert torch.equal(torch.cat([step(slice(0, 1)), step(slice(1, 3))]), whole)


def test_churn_is_refused_rather_than_ignored() -> None:
    scheduler = ours(NAME, {}, num_inference_steps=3)
    x, t = start(), scheduler.timesteps[0]
    with pytest.raises(ValueError, match=r"s_churn must be 0.*got 1.0"):
        scheduler.step(x, t, x, s_churn=1.0)


@pytest.mark.parametrize(
    ("config", "schedule", "message"),
    [
        ({}, {}, "give one of num_inference_steps, sigmas, timesteps, got none"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps must lie in"),
        ({}, {"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "must agree in length"),
        ({}, {"timesteps": [900.0], "sigmas": [1.0, 0.5]}, "must agree in length"),
        ({}, {"sigmas": [0.5, 1.0]}, "sigmas must descend"),
        ({}, {"sigmas": [0.5, float("nan")]}, "sigmas must be finite"),
        ({}, {"sigmas": [0.5, -0.5]}, "sigmas must not be negative"),
        ({"use_dynamic_shifting": True}, {"num_inference_steps": 3}, "mu must be given"),
        ({"time_shift_type": "both"}, {}, "time_shift_type must be"),
        ({"shift": 0.0}, {}, "shift must be positive, got 0"),
        ({"shift_terminal": 1.0}, {}, r"shift_terminal must lie in \(0, 1\), got 1"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, {}, "only one of"),
    ],
)
def test_arguments_that_cannot_be(
    config: dict[str, Any], schedule: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours(NAME, config, **schedule)


def test_a_straight_path_needs_one_step() -> None:
    """x = (1 - s) x0 + s z has the velocity z - x0 all along."""
    data, noise = start(), start(seed=6)
    for steps in (1, 4):
        scheduler = ours(NAME, {"shift": 2.0}, num_inference_steps=steps)
        x = scheduler.scale_noise(data, scheduler.timesteps[:1].expand(2), noise)
        for t in scheduler.timesteps:
            x = scheduler.step(noise - data, t, x).prev_sample
        torch.testing.assert_close(x, data, rtol=0, atol=1e-6)
