"""UniPCMultistepScheduler against diffusers', over whole loops."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from _multistep_loops import STEP_COUNTS, check_loops, error, model, noises, run, start
from torch import Tensor

from vqkernels.schedulers import UniPCMultistepScheduler

pytestmark = pytest.mark.usefixtures("one_thread")

diffusers.utils.logging.set_verbosity_error()
Theirs = diffusers.UniPCMultistepScheduler
BETAS = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [1e-4 * 1.01**i for i in range(200)], "num_train_timesteps": 200},
}


def check(config: dict[str, Any], **kwargs: Any) -> None:
    """The loops edit no sample: the correction of it is that of the last one."""
    check_loops(UniPCMultistepScheduler, Theirs, config, fixed=("discarded_edits",), **kwargs)


def ends_of(solver_type: str, predict_x0: bool) -> str:
    """diffusers has a NaN at the last step to sigma 0 but for this one, see below."""
    return "zero" if predict_x0 and solver_type == "bh2" else "sigma_min"


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_solvers(solver_order: int, solver_type: str, predict_x0: bool) -> None:
    check(
        {
            "solver_order": solver_order,
            "solver_type": solver_type,
            "predict_x0": predict_x0,
            "final_sigmas_type": ends_of(solver_type, predict_x0),
        }
    )


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("betas", BETAS)
def test_schedules(betas: str, spacing: str) -> None:
    check({**BETAS[betas], "timestep_spacing": spacing, "steps_offset": int(spacing == "leading")})


@pytest.mark.parametrize(
    "prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"]
)
def test_prediction_types(prediction_type: str) -> None:
    check({"prediction_type": prediction_type})


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_predicted_noise_of_every_type(prediction_type: str) -> None:
    """From a level with some signal: a rounding error of the noise grows by 1 / alpha, and from
    the default's alpha = 0.006 diffusers' own float32 is off by 1e-4.
    """
    config = {"predict_x0": False, "final_sigmas_type": "sigma_min", "beta_end": 0.004}
    check({**config, "prediction_type": prediction_type})


def test_predicted_noise_is_closer_than_diffusers() -> None:
    config = {
        "predict_x0": False,
        "final_sigmas_type": "sigma_min",
        "prediction_type": "v_prediction",
    }
    from _peers import float64_for_float32

    with float64_for_float32():
        truth = run(Theirs(**config), 2, dtype=torch.float64)
    ours = error(run(UniPCMultistepScheduler(**config), 2), truth)
    assert ours <= 1e-5
    assert error(run(Theirs(**config), 2), truth) > 10 * ours


@pytest.mark.parametrize(("ratio", "most"), [(0.995, 1.0), (0.9, 3.0)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_thresholding(prediction_type: str, ratio: float, most: float) -> None:
    check(
        {
            "prediction_type": prediction_type,
            "thresholding": True,
            "dynamic_thresholding_ratio": ratio,
            "sample_max_value": most,
        }
    )


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    "respacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
)
def test_respaced_levels(respacing: str, final: str) -> None:
    check({respacing: True, "final_sigmas_type": final})
    # Many steps of the beta distribution near its highest level share one timestep.
    counts = (1, 2, 3) if respacing == "use_beta_sigmas" else STEP_COUNTS
    limits = {"sigma_min": 0.05, "sigma_max": 60.0}
    check({respacing: True, "final_sigmas_type": final, **limits}, counts=counts)


@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels(shift: float, solver_order: int) -> None:
    config = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": shift,
        "solver_order": solver_order,
    }
    check(config)
    check({**config, "final_sigmas_type": "sigma_min"})
    check({**config, "shift_terminal": 0.02}, counts=(2, 3, 7, 50))
    check({**config, "use_karras_sigmas": True})


def test_terminal_shift_of_one_step() -> None:
    config = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "shift_terminal": 0.02,
    }
    assert not run(Theirs(**config), 1).isfinite().any()
    assert not run(UniPCMultistepScheduler(**config, numerics="diffusers"), 1).isfinite().any()
    plain = {**config, "shift_terminal": None}
    result = run(UniPCMultistepScheduler(**config), 1)
    assert torch.equal(result, run(UniPCMultistepScheduler(**plain), 1))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift(kind: str) -> None:
    config = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "use_dynamic_shifting": True,
        "time_shift_type": kind,
    }
    check(config, layout={"mu": 0.8})
    for numerics in ("exact", "diffusers"):
        with pytest.raises(ValueError, match="mu must be given"):
            UniPCMultistepScheduler(**config, numerics=numerics).set_timesteps(3)


@pytest.mark.parametrize("sigmas", [[1.0], [0.9, 0.3], [1.0, 0.8, 0.5, 0.31, 0.05]])
def test_custom_sigmas(sigmas: list[float]) -> None:
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
    check(config, counts=(None,), layout={"sigmas": np.array(sigmas)})


@pytest.mark.parametrize(
    "config",
    [
        {"disable_corrector": [0, 1, 5]},
        {"disable_corrector": [0, 2], "solver_order": 3},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min", "solver_order": 3},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
        {"solver_type": "midpoint"},
    ],
    ids=str,
)
def test_options(config: dict[str, Any]) -> None:
    check(config)


@pytest.mark.parametrize(
    "config",
    [
        {"solver_type": "bh1"},
        {"predict_x0": False},
        {"predict_x0": False, "solver_type": "bh1"},
        {"lower_order_final": False},
    ],
    ids=str,
)
def test_last_step_to_no_noise(config: dict[str, Any]) -> None:
    """diffusers multiplies 0 by infinity there; the limit is the data as predicted."""
    assert not run(Theirs(**config), 7).isfinite().all()
    same = run(UniPCMultistepScheduler(**config, numerics="diffusers"), 7)
    assert torch.equal(same.isfinite(), run(Theirs(**config), 7).isfinite())
    result = run(UniPCMultistepScheduler(**config), 7)
    near = UniPCMultistepScheduler(**{**config, "predict_x0": True, "solver_type": "bh2"})
    near = UniPCMultistepScheduler.from_config(near.config, lower_order_final=True)
    assert error(result, run(near, 7)) < 0.2  # another solver of the same ODE

    scheduler = UniPCMultistepScheduler(**config)
    scheduler.set_timesteps(1)
    x, t = start(), scheduler.timesteps[0]
    kept = scheduler.alphas_cumprod[t].double()
    data = (x.double() - (1 - kept).sqrt() * model(x, t)) / kept.sqrt()
    assert error(scheduler.step(model(x, t), t, x).prev_sample, data) <= 1e-5


def test_repeated_levels() -> None:
    """As many steps as there are timesteps: one level repeats, and diffusers divides 0 by 0."""
    assert not run(Theirs(), 1000).isfinite().all()
    result = run(UniPCMultistepScheduler(), 1000)
    assert error(result, run(UniPCMultistepScheduler(), 500)) < 0.02


def test_thresholds_of_predicted_noise() -> None:
    config = {"predict_x0": False, "thresholding": True, "final_sigmas_type": "sigma_min"}
    with pytest.raises(ValueError, match="thresholding needs predict_x0=True"):
        UniPCMultistepScheduler(**config)
    same = UniPCMultistepScheduler(**config, numerics="diffusers")
    assert torch.equal(run(same, 5), run(Theirs(**config), 5))


def test_half_precision_as_diffusers() -> None:
    for config in ({}, {"solver_order": 3}, {"thresholding": True}):
        expected = run(Theirs(**config), 7, dtype=torch.bfloat16)
        same = UniPCMultistepScheduler(**config, numerics="diffusers")
        result = run(same, 7, dtype=torch.bfloat16)
        assert result.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(result, expected)


def test_half_precision_outputs_with_a_float32_state() -> None:
    scheduler = UniPCMultistepScheduler()
    scheduler.set_timesteps(5)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).bfloat16(), t, x).prev_sample
    assert x.dtype == torch.float32
    assert error(x, run(UniPCMultistepScheduler(), 5)) < 0.02


def test_starts_in_the_middle() -> None:
    for config in ({"solver_order": 3}, {"solver_order": 2, "disable_corrector": [8, 10]}):
        results = []
        for scheduler in (
            Theirs(**config),
            UniPCMultistepScheduler(**config),
            UniPCMultistepScheduler(**config, numerics="diffusers"),
        ):
            for begin in (None, 8):
                scheduler.set_timesteps(20)
                if begin is not None:
                    scheduler.set_begin_index(begin)
                x = start()
                for t in scheduler.timesteps[8:]:
                    x = scheduler.step(model(x, t), t, x).prev_sample
                results.append(x)
        assert torch.equal(results[2], results[3])
        assert error(results[2], results[0]) <= 1e-5
        for same in (results[1], results[4], results[5]):
            assert torch.equal(same, results[0])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    outputs = [model(start(), t) for t in torch.arange(9)]
    results = []
    for part in (slice(None), slice(1, 2)):
        scheduler = UniPCMultistepScheduler(solver_order=3)
        scheduler.set_timesteps(9)
        x = start()[part]
        for output, t in zip(outputs, scheduler.timesteps, strict=True):
            x = scheduler.step(output[part], t, x).prev_sample
        results.append(x)
    assert torch.equal(results[1], results[0][1:2])


@pytest.mark.parametrize("begin", [0, 3])
def test_rows_on_the_device(begin: int) -> None:
    """Driven by row numbers that are tensors, as a loop of ops does: the same steps."""
    scheduler, stepped = UniPCMultistepScheduler(), UniPCMultistepScheduler()
    for each in (scheduler, stepped):
        each.set_timesteps(8)
        each.set_begin_index(begin)
    x = y = start()
    for row in range(begin, 8):
        t = scheduler.timesteps[row]
        x, prediction = scheduler._advance(x, model(x, t), torch.tensor(row))
        y = stepped.step(model(y, t), t, y).prev_sample
        assert torch.equal(x, y)
        assert prediction is not None
        assert torch.equal(prediction, stepped.model_outputs[-1])


def test_a_second_loop_starts_anew() -> None:
    scheduler = UniPCMultistepScheduler()
    first = run(scheduler, 6)
    assert torch.equal(run(scheduler, 6), first)


def test_guidance_in_the_step() -> None:
    scheduler, plain = UniPCMultistepScheduler(), UniPCMultistepScheduler()
    for each in (scheduler, plain):
        each.set_timesteps(6)
    x = y = start()
    for t in scheduler.timesteps:
        x = scheduler.step(
            model(x, t), t, x, uncond_output=model(-x, t), guidance_scale=3.0
        ).prev_sample
        mixed = torch.lerp(model(-y, t), model(y, t), 3.0)
        y = plain.step(mixed, t, y).prev_sample
    assert error(x, y) <= 1e-5
    with pytest.raises(ValueError, match="uncond_output needs numerics='exact'"):
        run(UniPCMultistepScheduler(numerics="diffusers"), 2, uncond_output=x)


@pytest.mark.parametrize("edits_count", [True, False])
def test_one_call_a_step(monkeypatch: pytest.MonkeyPatch, edits_count: bool) -> None:
    """Correction and prediction are one call of the op, and no tensor is asked for its value."""
    from vqkernels.schedulers import _scheduler

    calls = []
    op = _scheduler.denoise_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append((len(kwargs["history"]), kwargs.get("want_extra", False)))
        return op(*args, **kwargs)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a step asked a tensor for its value")

    compat = () if edits_count else ("discarded_edits",)
    scheduler = UniPCMultistepScheduler(solver_order=3, disable_corrector=[3], compat=compat)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    x = start()
    outputs = [model(x, t) for t in scheduler.timesteps]
    monkeypatch.setattr(_scheduler, "denoise_step", counted)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, forbidden)
    for output, t in zip(outputs, scheduler.timesteps, strict=True):
        x = scheduler.step(output, t, x).prev_sample
    if edits_count:
        assert calls == [(0, False), (1, False), (2, False), *[(3, False)] * 3]
    else:
        # The corrected sample is written where it is not the sample itself and is read again.
        wanted = [False, True, True, False, False, False]
        assert calls == list(zip([0, 2, 3, 4, 4, 4], wanted, strict=True))


def test_edits_between_steps_stay() -> None:
    """A pipeline sets what is known in the sample: diffusers' corrector starts from the last
    sample and loses it.
    """
    mask = torch.zeros(start().shape, dtype=torch.bool)
    mask[..., 0] = True

    def edited(scheduler: Any, changes: bool = True) -> Tensor:
        scheduler.set_timesteps(7)
        x = start()
        for i, t in enumerate(scheduler.timesteps[:4]):
            x = scheduler.step(model(start(), torch.tensor(i)), t, x).prev_sample
            if changes and i == 2:
                x = torch.where(mask, 100.0, x)
        return x

    config = {"prediction_type": "sample"}
    ours = UniPCMultistepScheduler(**config)
    plain, changed = edited(ours, changes=False), edited(ours)
    assert error(plain, edited(Theirs(**config), changes=False)) <= 1e-5
    assert torch.equal(changed[~mask], plain[~mask])
    assert changed[mask].min() > 20

    assert torch.equal(edited(Theirs(**config)), edited(Theirs(**config), changes=False))
    compat = UniPCMultistepScheduler(**config, compat=("discarded_edits",))
    assert torch.equal(edited(compat), edited(compat, changes=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_noise(dtype: torch.dtype) -> None:
    for config in ({}, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}):
        peer, same = Theirs(**config), UniPCMultistepScheduler(**config, numerics="diffusers")
        exact = UniPCMultistepScheduler(**config)
        for each in (peer, same, exact):
            each.set_timesteps(10)
        t = peer.timesteps[[0, 4, 9]]
        x, z = start(dtype), noises(1)[0].to(dtype)
        expected = peer.add_noise(x, z, t)
        assert torch.equal(same.add_noise(x, z, t), expected)
        levels = exact.sigmas.double()[[0, 4, 9]][:, None, None, None]
        alpha = 1 - levels if config else 1 / (levels**2 + 1).sqrt()
        sigma = levels if config else levels * alpha
        truth = alpha * x.double() + sigma * z.double()
        bound = 1e-6 if dtype == torch.float32 else 2**-8
        noisy = exact.add_noise(x, z, t)
        assert (noisy.double() - truth).abs().max() <= bound * truth.abs().max()
    with pytest.raises(ValueError, match="use_flow_sigmas needs set_timesteps"):
        UniPCMultistepScheduler(**config).add_noise(x, z, t)


def test_config_goes_both_ways(tmp_path: Any) -> None:
    ours = UniPCMultistepScheduler(solver_order=3, disable_corrector=[0], use_karras_sigmas=True)
    ours.save_pretrained(tmp_path)
    theirs = Theirs.from_pretrained(tmp_path)
    assert theirs.config.disable_corrector == [0]
    theirs.save_pretrained(tmp_path / "theirs")
    again = UniPCMultistepScheduler.from_pretrained(tmp_path / "theirs")
    for name, value in ours.config.items():
        if not name.startswith("_"):
            assert again.config[name] == value, name
    from_dpm = UniPCMultistepScheduler.from_config(
        diffusers.DPMSolverMultistepScheduler(solver_type="heun", solver_order=3).config
    )
    assert from_dpm.config.solver_type == "bh2"
    assert from_dpm.config.solver_order == 3


def test_same_defaults_as_diffusers() -> None:
    theirs, ours = dict(Theirs().config), dict(UniPCMultistepScheduler().config)
    for config in (theirs, ours):
        for name in ("_class_name", "_diffusers_version", "_use_default_values"):
            config.pop(name, None)
    assert list(ours) == list(theirs)
    assert ours == theirs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"solver_order": 4}, r"solver_order must be 1, 2 or 3, got 4"),
        ({"solver_type": "bh3"}, r"solver_type must be one of .*got 'bh3'"),
        ({"solver_p": object()}, r"solver_p is not supported"),
        ({"shift_terminal": 0.1}, r"shift_terminal goes with use_flow_sigmas=True"),
        (
            {"predict_x0": False, "prediction_type": "flow_prediction"},
            r"prediction_type must be .* got 'flow_prediction'",
        ),
        (
            {"use_flow_sigmas": True, "use_beta_sigmas": True},
            r"use_flow_sigmas can't be given with use_beta_sigmas=True",
        ),
        ({"time_shift_type": "cubic"}, r"time_shift_type must be one of .*got 'cubic'"),
    ],
    ids=str,
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniPCMultistepScheduler(**config)


@pytest.mark.parametrize("numerics", ["exact", "diffusers"])
def test_bad_calls(numerics: str) -> None:
    scheduler = UniPCMultistepScheduler(numerics=numerics)
    x = start()
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 999, x)
    for steps in (0, -1, 1001, 2.5):
        with pytest.raises(ValueError, match=f"num_inference_steps must .*got {steps}"):
            scheduler.set_timesteps(steps)
    with pytest.raises(ValueError, match="give num_inference_steps or sigmas, got neither"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="sigmas goes with use_flow_sigmas=True"):
        scheduler.set_timesteps(sigmas=[1.0])
    flow = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", numerics=numerics
    )
    for sigmas, message in (
        ([0.5, 0.9], "sigmas must descend"),
        ([0.9, float("nan")], "sigmas must be finite"),
        ([0.9, -0.1], "sigmas must not be negative"),
        ([1.5, 0.5], r"sigmas must lie in \(0, 1\]"),
        ([0.5, 0.0], r"sigmas must lie in \(0, 1\]"),
        ([], "sigmas must be one row of numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.set_timesteps(sigmas=sigmas)
    with pytest.raises(ValueError, match="must be the number of sigmas, 2, or None, got 3"):
        flow.set_timesteps(3, sigmas=[0.9, 0.5])
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="timestep must be one of the 2 of the schedule"):
        scheduler.step(x, 998, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="the schedule has 2 steps, got one more"):
        scheduler.step(x, 500, x)
