"""DDPMScheduler against diffusers over whole loops, and where it means to differ."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import diffusers
import pytest
import torch
from _peers import STEPS, compare, distance, generator, loop, start, toy_model
from torch import Tensor

from vqkernels.schedulers import DDPMScheduler

pytestmark = pytest.mark.usefixtures("one_thread")

SPACINGS = ("leading", "trailing", "linspace")
FIXED = ("fixed_small", "fixed_small_log", "fixed_large")
two_halves = functools.partial(toy_model, channels=2)


def check(
    steps: int | None = 7,
    timesteps: list[int] | None = None,
    model: Any = toy_model,
    **arguments: Any,
) -> None:
    def run(scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(steps, timesteps=timesteps)
        return loop(scheduler, x, model, generator=generator())

    compare(DDPMScheduler, diffusers.DDPMScheduler, arguments, run)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_loops_follow_diffusers(prediction_type: str, spacing: str) -> None:
    kinds = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    for steps, variance_type in itertools.product(STEPS, FIXED):
        check(steps, variance_type=variance_type, **kinds)
    check(7, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0, **kinds)
    check(7, clip_sample_range=0.5, **kinds)
    if prediction_type != "epsilon":
        check(3, clip_sample=False, **kinds)
        check(7, rescale_betas_zero_snr=True, **kinds)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variances(variance_type: str, spacing: str) -> None:
    for steps in STEPS:
        check(steps, variance_type=variance_type, timestep_spacing=spacing, model=two_halves)


@pytest.mark.parametrize(
    "beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
)
def test_beta_schedules(beta_schedule: str) -> None:
    for steps in (3, 50):
        check(steps, beta_schedule=beta_schedule, prediction_type="v_prediction")


def test_custom_timesteps() -> None:
    for timesteps in ([999, 500, 20, 0], [700, 699, 698], [5], [0]):
        for variance_type in FIXED:
            check(None, timesteps, variance_type=variance_type, prediction_type="sample")


def test_every_training_timestep_without_set_timesteps() -> None:
    def run(scheduler: Any, x: Tensor) -> Tensor:
        return loop(scheduler, x, generator=generator())

    arguments = {"num_train_timesteps": 40, "prediction_type": "v_prediction"}
    compare(DDPMScheduler, diffusers.DDPMScheduler, arguments, run)
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    assert ours.previous_timestep(7) == theirs.previous_timestep(7) == 6
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    assert ours.previous_timestep(700) == theirs.previous_timestep(700) == 600
    assert ours.previous_timestep(0) == theirs.previous_timestep(0) == -1


def test_the_fault_of_the_large_logarithm() -> None:
    """fixed_large_log is fixed_large, but for diffusers' root of a negative logarithm."""
    x = start()

    def run(**arguments: Any) -> Tensor:
        scheduler = DDPMScheduler(**arguments)
        scheduler.set_timesteps(7)
        return loop(scheduler, x, generator=generator())

    theirs = diffusers.DDPMScheduler(variance_type="fixed_large_log")
    theirs.set_timesteps(7)
    assert loop(theirs, x, generator=generator()).isnan().all()
    large = run(variance_type="fixed_large")
    assert distance(run(variance_type="fixed_large_log"), large) < 1e-6
    assert (
        distance(run(variance_type="fixed_large_log", numerics="diffusers", compat=()), large)
        < 1e-5
    )
    assert run(variance_type="fixed_large_log", compat=("fixed_large_log",)).isnan().all()
    assert run(variance_type="fixed_large_log", numerics="diffusers").isnan().all()


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_the_fault_of_noise_after_the_last_step(variance_type: str) -> None:
    """A schedule that ends above timestep 0 ends with the data all the same, not with noise."""
    x0 = start(seed=3)

    def knows(x: Tensor, t: Any) -> Tensor:
        return torch.cat([x0, x0.sigmoid()], 1) if variance_type == "learned_range" else x0

    arguments = {
        "timestep_spacing": "trailing",
        "prediction_type": "sample",
        "clip_sample": False,
        "variance_type": variance_type,
    }
    for numerics in ("exact", "diffusers"):
        fixed = DDPMScheduler(**arguments, numerics=numerics, compat=())
        faulty = DDPMScheduler(**arguments, numerics=numerics, compat=("final_step_noise",))
        theirs = diffusers.DDPMScheduler(**arguments)
        results = []
        for scheduler in (fixed, faulty, theirs):
            scheduler.set_timesteps(8)
            results.append(loop(scheduler, start(), knows, generator=generator()))
        assert distance(results[0], x0) < 1e-6
        assert distance(results[2], x0) > 0.05
        assert distance(results[1], results[2]) < 1e-5


def test_keyed_noise_is_a_samples_own() -> None:
    """Whatever the batch, the same seed and id give the same sample, in both numerics."""
    x = start((4, 3, 8, 8))
    for numerics in ("exact", "diffusers"):
        scheduler = DDPMScheduler(numerics=numerics)
        scheduler.set_timesteps(5)
        ids = torch.arange(4)
        whole = loop(scheduler, x, seed=7, sample_ids=ids)
        parts = [loop(scheduler, x[i:j], seed=7, sample_ids=ids[i:j]) for i, j in ((0, 1), (1, 4))]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(loop(scheduler, x, seed=torch.tensor(7)), whole)
        assert distance(loop(scheduler, x, seed=8), whole) > 0.01
    exact = DDPMScheduler()
    exact.set_timesteps(5)
    assert distance(loop(exact, x, seed=7), whole) < 1e-5


def test_learned_variance_with_guidance() -> None:
    """The variance is the conditional output's; guidance acts on the mean alone."""
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[1]
    x = start()
    conditional, unconditional = two_halves(x, 900), two_halves(x.flip(0), 900)
    mean = unconditional[:, :3] + 3 * (conditional - unconditional)[:, :3]
    by_hand = torch.cat([mean, conditional[:, 3:]], dim=1)
    expected = scheduler.step(by_hand, t, x, seed=1).prev_sample
    for scale in (3.0, torch.tensor(3.0), torch.full((2,), 3.0)):
        found = scheduler.step(
            conditional, t, x, seed=1, uncond_output=unconditional, guidance_scale=scale
        ).prev_sample
        assert distance(found, expected) < 1e-5


def test_bad_arguments() -> None:
    x = start()
    with pytest.raises(ValueError, match=r"variance_type must be one of .*, got 'large'"):
        DDPMScheduler(variance_type="large")
    scheduler = DDPMScheduler(variance_type="learned")
    for steps, timesteps in ((None, None), (5, [3, 2])):
        with pytest.raises(ValueError, match="give num_inference_steps or timesteps"):
            scheduler.set_timesteps(steps, timesteps=timesteps)
    for timesteps, message in (
        ([1, 2], "descending"),
        ([1000, 2], r"lie in \[0, num_train_timesteps = 1000\), got 1000 to 2"),
        ([5, -1], r"lie in \[0"),
        ([], "at least one"),
        ([5.5, 1], "whole numbers"),
        ([float("nan"), 1], "whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(timesteps=timesteps)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"model_output must have twice the sample's channels"):
        scheduler.step(x, 750, x)
