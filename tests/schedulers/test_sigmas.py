"""Noise levels, bit for bit against diffusers in its precision and against formulas in float64."""

from __future__ import annotations

import math
import sys

import diffusers
import numpy as np
import pytest
import torch

from vqkernels.schedulers import EulerDiscreteScheduler, _sigmas

STEPS = (1, 2, 3, 7, 50, 1000)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", _sigmas.RESPACINGS)
def test_respacing_is_that_of_diffusers(name: str, steps: int) -> None:
    theirs = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    levels = np.linspace(0.0292, 14.6146, 17)[::-1]
    expected = getattr(theirs, f"_convert_to_{name}")(levels, steps)
    assert np.array_equal(_sigmas.respaced_sigmas(name, steps, levels[-1], levels[0]), expected)
    assert expected.dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_timesteps_of_levels_are_those_of_diffusers(schedule: str, dtype: type) -> None:
    theirs = diffusers.EulerDiscreteScheduler(beta_schedule=schedule, rescale_betas_zero_snr=True)
    log_sigmas = np.log(_sigmas.variance_exploding_sigmas(theirs.alphas_cumprod))
    levels = np.array([1e5, 4096, 50.5, 3, 1, 0.1, 0.01, 1e-3, 0]).astype(dtype)
    levels = np.concatenate([levels, np.exp(log_sigmas[[0, 1, 500, 998, 999]]).astype(dtype)])
    expected = [theirs._sigma_to_t(level, log_sigmas) for level in levels]
    times = _sigmas.sigma_to_t(levels, log_sigmas)
    assert np.array_equal(times, np.array(expected).reshape(times.shape))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_shifts_are_those_of_diffusers(kind: str, dtype: type) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(time_shift_type=kind, shift_terminal=0.1)
    levels = np.linspace(1, 0.001, 29).astype(dtype)
    assert np.array_equal(
        _sigmas.time_shift(kind, 0.83, levels), theirs.time_shift(0.83, 1.0, levels)
    )
    assert np.array_equal(
        _sigmas.stretch_to_terminal(levels, 0.1), theirs.stretch_shift_to_terminal(levels)
    )


def test_a_shift_moves_a_flow_towards_noise() -> None:
    levels = np.array([1.0, 0.5, 0.25, 0.0])
    assert _sigmas.shift_sigmas(levels, 3.0) == pytest.approx([1, 0.75, 0.5, 0])
    assert _sigmas.shift_sigmas(levels, 1.0) == pytest.approx(levels)
    assert _sigmas.time_shift("exponential", math.log(3), levels[:3]) == pytest.approx(
        [1, 0.75, 0.5]
    )
    assert _sigmas.stretch_to_terminal(levels[:3], 0.1)[-1] == pytest.approx(0.1)


def test_karras_levels_are_linear_in_the_seventh_root() -> None:
    ramp = torch.linspace(0, 1, 11, dtype=torch.float64)
    roots = _sigmas.karras_sigmas(ramp, 0.002, 80.0) ** (1 / 7)
    expected = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 11, dtype=torch.float64)
    torch.testing.assert_close(roots, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"sigmas must be one row of numbers, got shape \[0\]"),
        ([[1.0, 0.5]], r"sigmas must be one row of numbers, got shape \[1, 2\]"),
        ([1.0, math.nan], "sigmas must be finite"),
        (torch.tensor([math.inf, 1.0]), "sigmas must be finite"),
        ([1.0, -0.5], "sigmas must not be negative, got -0.5"),
        ([0.5, 1.0], r"sigmas must descend, got \[0.5, 1.0\]"),
    ],
)
def test_levels_that_cannot_be(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sigmas.given_levels("sigmas", values)


def test_one_respacing_at_a_time() -> None:
    assert _sigmas.respacing_of({}) is None
    assert _sigmas.respacing_of({"use_beta_sigmas": True, "use_karras_sigmas": False}) == "beta"
    with pytest.raises(ValueError, match="got use_karras_sigmas and use_beta_sigmas"):
        _sigmas.respacing_of({"use_beta_sigmas": True, "use_karras_sigmas": True})


def test_beta_sigmas_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match="use_beta_sigmas needs scipy"):
        _sigmas.beta_sigmas(3, 0.1, 1.0)
    with pytest.raises(ImportError, match="use_beta_sigmas needs scipy"):
        EulerDiscreteScheduler(use_beta_sigmas=True)
