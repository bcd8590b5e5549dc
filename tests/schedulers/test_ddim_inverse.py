"""DDIMInverseScheduler against diffusers over whole loops, and where it means to differ."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from _peers import STEPS, compare, distance, loop, start, toy_model
from torch import Tensor

from vqkernels.schedulers import DDIMInverseScheduler, DDIMScheduler

pytestmark = pytest.mark.usefixtures("one_thread")


def check(steps: int, **arguments: Any) -> None:
    def run(scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(steps)
        return loop(scheduler, x)

    compare(DDIMInverseScheduler, diffusers.DDIMInverseScheduler, arguments, run)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_loops_follow_diffusers(beta_schedule: str, prediction_type: str, spacing: str) -> None:
    for steps, clip in itertools.product(STEPS, (True, False)):
        check(
            steps,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            clip_sample=clip,
            set_alpha_to_one=prediction_type != "sample",
        )


def test_other_arguments() -> None:
    check(7, steps_offset=1, set_alpha_to_one=False, clip_sample_range=2.0)
    check(7, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    check(7, num_train_timesteps=50, trained_betas=[0.01 + 0.002 * i for i in range(50)])
    check(61, timestep_spacing="trailing", prediction_type="v_prediction")


def test_the_fault_of_the_previous_timestep() -> None:
    """A trailing schedule starts from clean data, not from timestep 0."""
    x = start()
    arguments = {"timestep_spacing": "trailing", "clip_sample": False}
    fixed, faulty = (
        DDIMInverseScheduler(**arguments, compat=compat)
        for compat in ((), ("linspace_previous_timestep",))
    )
    for scheduler in (fixed, faulty):
        scheduler.set_timesteps(7)
    sources = [fixed._source(row) for row in range(7)]
    assert sources == [-1, *fixed.timesteps[:-1].tolist()]
    assert faulty._source(0) == 0
    assert distance(loop(fixed, x), loop(faulty, x)) > 1e-3
    theirs = diffusers.DDIMInverseScheduler(**arguments)
    theirs.set_timesteps(7)
    assert distance(loop(faulty, x), loop(theirs, x)) < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_it_inverts_ddim(spacing: str) -> None:
    """With an output that doesn't depend on the sample, there and back again is the identity."""
    x, output = start(), start(seed=6)
    arguments = {"timestep_spacing": spacing, "clip_sample": False}
    there, back = DDIMInverseScheduler(**arguments), DDIMScheduler(**arguments)
    there.set_timesteps(7)
    back.set_timesteps(7)
    noisy = loop(there, x.double(), lambda x, t: output.double())
    assert distance(noisy, x) > 0.1
    again = loop(back, noisy, lambda x, t: output.double())
    assert distance(again, x) < 1e-5


def test_data_without_noise_does_not_tell_its_noise() -> None:
    scheduler = DDIMInverseScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match=r"prediction_type must be .*set_alpha_to_one=True"):
        scheduler.set_timesteps(5)


def test_guided_and_as_a_tuple() -> None:
    scheduler = DDIMInverseScheduler()
    scheduler.set_timesteps(5)
    x = start()
    conditional, unconditional = toy_model(x, 200), toy_model(x, 900)
    by_hand = unconditional + 2 * (conditional - unconditional)
    expected = scheduler.step(by_hand, 200, x, return_dict=False)
    found = scheduler.step(
        conditional, 200, x, False, uncond_output=unconditional, guidance_scale=2.0
    )
    assert isinstance(found, tuple)
    for mine, true in zip(found, expected, strict=True):
        assert distance(mine, true) < 1e-5
    assert scheduler.step(conditional, 200, x, want_prediction=False).pred_original_sample is None
    assert torch.equal(
        found[0],
        scheduler.step(conditional, 200, x, uncond_output=unconditional, guidance_scale=2.0)[
            "prev_sample"
        ],
    )
