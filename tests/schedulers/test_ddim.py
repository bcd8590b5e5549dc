"""DDIMScheduler against diffusers over whole loops, and where it means to differ."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from _peers import STEPS, compare, distance, generator, loop, start
from torch import Tensor

from vqkernels.schedulers import DDIMScheduler

pytestmark = pytest.mark.usefixtures("one_thread")

SPACINGS = ("leading", "trailing", "linspace")
THRESHOLDS = (
    {"clip_sample": False},
    {"clip_sample_range": 0.7},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
)


def check(steps: int = 7, options: dict[str, Any] | None = None, **arguments: Any) -> None:
    options = options or {}

    def run(scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(steps)
        return loop(scheduler, x, generator=generator(), **options)

    compare(DDIMScheduler, diffusers.DDIMScheduler, arguments, run)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_loops_follow_diffusers(beta_schedule: str, prediction_type: str, spacing: str) -> None:
    kinds = {
        "beta_schedule": beta_schedule,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
    }
    for steps, threshold in itertools.product(STEPS, THRESHOLDS):
        check(steps, **kinds, **threshold)
    for steps, threshold in itertools.product((3, 7), THRESHOLDS):
        check(steps, {"eta": 0.6}, **kinds, **threshold)
        check(steps, {"use_clipped_model_output": True}, **kinds, **threshold)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr(prediction_type: str, spacing: str) -> None:
    for steps, beta_schedule in itertools.product(STEPS, ("scaled_linear", "linear")):
        check(
            steps,
            rescale_betas_zero_snr=True,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            beta_schedule=beta_schedule,
        )


def test_other_arguments() -> None:
    check(set_alpha_to_one=False)
    check(steps_offset=1, set_alpha_to_one=False)
    check(beta_start=0.002, beta_end=0.05, num_train_timesteps=200)
    check(num_train_timesteps=50, trained_betas=[0.01 + 0.002 * i for i in range(50)])
    check(steps=50, options={"eta": 1.0})


def test_generators_a_sample_and_given_noise() -> None:
    x = start()
    theirs, ours = diffusers.DDIMScheduler(), DDIMScheduler()
    theirs.set_timesteps(5)
    ours.set_timesteps(5)
    expected, found = (
        loop(scheduler, x, eta=1.0, generator=[generator(3), generator(4)])
        for scheduler in (theirs, ours)
    )
    assert distance(found, expected) < 1e-5
    noise = start(seed=9)
    expected, found = (
        loop(scheduler, x, eta=1.0, variance_noise=noise) for scheduler in (theirs, ours)
    )
    assert distance(found, expected) < 1e-5


def test_the_fault_of_the_previous_timestep() -> None:
    """t - T // N is not the schedule's next timestep unless the spacing is "leading"."""
    x = start()

    def steps(spacing: str, count: int, **arguments: Any) -> tuple[Tensor, list[int]]:
        scheduler = DDIMScheduler(
            timestep_spacing=spacing, prediction_type="sample", clip_sample=False, **arguments
        )
        scheduler.set_timesteps(count)
        arrivals = [scheduler._previous(row) for row in range(count)]
        return loop(scheduler, x), arrivals

    for spacing in ("trailing", "linspace"):
        fault = ("linspace_previous_timestep",)
        fixed, arrivals = steps(spacing, 7)
        faulty, their_arrivals = steps(spacing, 7, compat=fault)
        scheduler = DDIMScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(7)
        assert arrivals == [*scheduler.timesteps[1:].tolist(), -1]
        assert their_arrivals != arrivals
        assert distance(fixed, faulty) > 1e-3
        fixed_too, _ = steps(spacing, 7, numerics="diffusers", compat=())
        assert distance(fixed, fixed_too) < 1e-5

    # A model that predicts x exactly gets x back, as a sampler that ends at alpha = 1 should.
    x0 = start(seed=3)
    for compat, exact in (((), True), (("linspace_previous_timestep",), False)):
        scheduler = DDIMScheduler(
            timestep_spacing="trailing", prediction_type="sample", clip_sample=False, compat=compat
        )
        scheduler.set_timesteps(7)
        arrived = loop(scheduler, x, model=lambda x, t: x0)
        assert torch.allclose(arrived, x0, atol=1e-6) == exact


def test_the_fault_of_one_timestep_too_many() -> None:
    """1000 counted down by 1000 / 61 passes 62 numbers above 0 in floating point."""
    ours, theirs = (
        DDIMScheduler(timestep_spacing="trailing"),
        diffusers.DDIMScheduler(timestep_spacing="trailing"),
    )
    ours.set_timesteps(61)
    theirs.set_timesteps(61)
    assert len(ours.timesteps) == 61
    assert len(theirs.timesteps) == 62
    assert theirs.timesteps[-1] == -1
    assert torch.equal(ours.timesteps, theirs.timesteps[:-1])
    check(61, timestep_spacing="trailing", prediction_type="v_prediction")


def test_eta_must_fit() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    x = start()
    with pytest.raises(ValueError, match=r"eta must be at least 0, got -1"):
        scheduler.step(x, 666, x, eta=-1.0)
    with pytest.raises(ValueError, match=r"eta must not add more noise .*, got 5"):
        scheduler.step(x, 666, x, eta=5.0)
    with pytest.raises(ValueError, match=r"variance_noise and generator"):
        scheduler.step(x, 666, x, eta=1.0, generator=generator(), variance_noise=x)


def test_epsilon_at_zero_snr_is_refused() -> None:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"prediction_type must be .*rescale_betas_zero_snr"):
        scheduler.set_timesteps(4)
    DDIMScheduler(rescale_betas_zero_snr=True).set_timesteps(4)  # leading: never at t = 999


def test_guided_a_sample() -> None:
    """Each sample by its own scale equals one call a sample, and the formula."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    x, conditional, unconditional = start(), start(seed=6), start(seed=7)
    t = scheduler.timesteps[1]
    scales = torch.tensor([1.5, 7.0])
    together = scheduler.step(
        conditional, t, x, uncond_output=unconditional, guidance_scale=scales
    ).prev_sample
    weights = scales[:, None, None, None]
    by_hand = unconditional + weights * (conditional - unconditional)
    assert distance(together, scheduler.step(by_hand, t, x).prev_sample) < 1e-5
    for i, scale in enumerate(scales.tolist()):
        alone = scheduler.step(
            conditional[i : i + 1],
            t,
            x[i : i + 1],
            uncond_output=unconditional[i : i + 1],
            guidance_scale=scale,
            guidance_rescale=0.0,
        ).prev_sample
        assert torch.equal(together[i : i + 1], alone)
    keyed = {"eta": 1.0, "seed": 3, "uncond_output": unconditional}
    one = scheduler.step(conditional, t, x, guidance_scale=2.0, **keyed).prev_sample
    same = torch.tensor([2.0, 2.0])
    assert torch.equal(scheduler.step(conditional, t, x, guidance_scale=same, **keyed)[0], one)
    for guidance in (
        {"guidance_scale": 2.0},
        {"guidance_scale": scales},
        {"guidance_rescale": 0.7},
    ):
        with pytest.raises(ValueError, match="need uncond_output, got None"):
            scheduler.step(conditional, t, x, **guidance)
    theirs = DDIMScheduler(numerics="diffusers")
    theirs.set_timesteps(4)
    with pytest.raises(ValueError, match="uncond_output needs numerics='exact'"):
        theirs.step(conditional, t, x, uncond_output=unconditional)


def test_rescaled_guidance_follows_its_equation() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    x, conditional, unconditional = start(), start(seed=6), start(seed=7)
    t = scheduler.timesteps[0]
    guided = unconditional + 5 * (conditional - unconditional)
    ratio = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    expected = scheduler.step(0.7 * ratio * guided + 0.3 * guided, t, x).prev_sample
    found = scheduler.step(
        conditional, t, x, uncond_output=unconditional, guidance_scale=5.0, guidance_rescale=0.7
    ).prev_sample
    assert distance(found, expected) < 1e-5
