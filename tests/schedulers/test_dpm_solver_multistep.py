"""DPMSolverMultistepScheduler against diffusers', over whole loops."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from _multistep_loops import SHAPE, check_loops, error, model, noises, run, start
from torch import Tensor

from vqkernels import normal_noise
from vqkernels.schedulers import DPMSolverMultistepScheduler

pytestmark = pytest.mark.usefixtures("one_thread")

diffusers.utils.logging.set_verbosity_error()
Theirs = diffusers.DPMSolverMultistepScheduler
ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
BETAS = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [1e-4 * 1.01**i for i in range(200)], "num_train_timesteps": 200},
}


def check(config: dict[str, Any], **kwargs: Any) -> None:
    stochastic = config.get("algorithm_type", "").startswith("sde")
    check_loops(DPMSolverMultistepScheduler, Theirs, config, stochastic=stochastic, **kwargs)


def of_algorithm(algorithm: str) -> dict[str, Any]:
    ends = "zero" if algorithm.endswith("++") else "sigma_min"
    return {"algorithm_type": algorithm, "final_sigmas_type": ends}


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_solvers(algorithm: str, solver_order: int, solver_type: str) -> None:
    if (algorithm, solver_order) == ("sde-dpmsolver", 3):
        with pytest.raises(ValueError, match=r"solver_order must be 1 or 2 .* got 3"):
            DPMSolverMultistepScheduler(**of_algorithm(algorithm), solver_order=3)
        return
    check({**of_algorithm(algorithm), "solver_order": solver_order, "solver_type": solver_type})


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("betas", BETAS)
def test_schedules(betas: str, spacing: str) -> None:
    check({**BETAS[betas], "timestep_spacing": spacing, "steps_offset": int(spacing == "leading")})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"]
)
def test_prediction_types(prediction_type: str, algorithm: str) -> None:
    config = {**of_algorithm(algorithm), "prediction_type": prediction_type}
    if prediction_type == "flow_prediction" and not algorithm.endswith("++"):
        with pytest.raises(ValueError, match=r"prediction_type must be .* got 'flow_prediction'"):
            DPMSolverMultistepScheduler(**config)
        return
    check(config)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("ratio", "most"), [(0.995, 1.0), (0.9, 3.0)])
def test_thresholding(algorithm: str, prediction_type: str, ratio: float, most: float) -> None:
    check(
        {
            **of_algorithm(algorithm),
            "prediction_type": prediction_type,
            "thresholding": True,
            "dynamic_thresholding_ratio": ratio,
            "sample_max_value": most,
        }
    )


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    "respacing",
    ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"],
)
def test_respaced_levels(respacing: str, final: str) -> None:
    check({respacing: True, "final_sigmas_type": final})


def test_respaced_cosine_schedule() -> None:
    """Its timesteps are not rounded; more than 2 steps repeat the first one, see below."""
    check({"use_lu_lambdas": True, "beta_schedule": "squaredcos_cap_v2"}, counts=(1, 2))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels(shift: float) -> None:
    config = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": shift,
    }
    check(config)
    check({**config, "algorithm_type": "sde-dpmsolver++"})
    dynamic = {**config, "use_dynamic_shifting": True}
    check(dynamic, layout={"mu": 0.8})


@pytest.mark.parametrize(
    "config",
    [
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "solver_order": 3},
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        {"lambda_min_clipped": -3, "timestep_spacing": "leading"},
        {"lambda_min_clipped": -3, "timestep_spacing": "trailing"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
        {
            "rescale_betas_zero_snr": True,
            "prediction_type": "sample",
            "timestep_spacing": "trailing",
        },
        {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"},
    ],
    ids=str,
)
def test_options(config: dict[str, Any]) -> None:
    check(config)


@pytest.mark.parametrize("count", [14, 15, 16])
@pytest.mark.parametrize("solver_order", [2, 3])
def test_few_steps_lower_the_order(solver_order: int, count: int) -> None:
    check({"solver_order": solver_order, "final_sigmas_type": "sigma_min"}, counts=(count,))


@pytest.mark.parametrize("timesteps", [[999], [900, 350], [999, 800, 500, 120, 3, 0]])
def test_custom_timesteps(timesteps: list[int]) -> None:
    check({}, counts=(None,), layout={"timesteps": timesteps})
    check(
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
        counts=(None,),
        layout={"timesteps": timesteps},
    )


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
@pytest.mark.parametrize("one_each", [False, True])
def test_the_same_generator_draws_the_same_noise(algorithm: str, one_each: bool) -> None:
    def generators() -> Any:
        if not one_each:
            return torch.Generator().manual_seed(4)
        return [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]

    config = of_algorithm(algorithm)
    expected = run(Theirs(**config), 7, generator=generators())
    same = DPMSolverMultistepScheduler(**config, numerics="diffusers")
    assert torch.equal(run(same, 7, generator=generators()), expected)
    exact = run(DPMSolverMultistepScheduler(**config), 7, generator=generators())
    assert error(exact, expected) <= 1e-5


def test_half_precision_as_diffusers() -> None:
    for config in ({}, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}):
        draws = {"noise": noises(7)} if config else {}
        arguments: dict[str, Any] = {"dtype": torch.bfloat16, **draws}
        expected = run(Theirs(**config), 7, **arguments)
        same = DPMSolverMultistepScheduler(**config, numerics="diffusers")
        result = run(same, 7, **arguments)
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, expected)


def test_half_precision_outputs_with_a_float32_state() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(5)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).bfloat16(), t, x).prev_sample
    assert x.dtype == torch.float32
    assert error(x, run(DPMSolverMultistepScheduler(), 5)) < 0.02


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variance_is_cut_off(variance_type: str) -> None:
    """diffusers keeps three channels, whatever the sample has: here it has 4."""
    config = {"variance_type": variance_type}

    def both(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([model(x, t), torch.full_like(x, 7.0)], dim=1)

    cut, outputs = DPMSolverMultistepScheduler(**config), []
    assert torch.equal(run(cut, 7, call=both), run(DPMSolverMultistepScheduler(), 7))
    with pytest.raises(RuntimeError, match="must match the size"):
        run(Theirs(**config), 7, call=both)
    with pytest.raises(ValueError, match="model_output must have"):
        run(DPMSolverMultistepScheduler(**config, compat=("three_channels",)), 7, call=both)

    cut.set_timesteps(2)
    guided, plain = DPMSolverMultistepScheduler(), start()
    guided.set_timesteps(2)
    for scheduler, call in ((cut, both), (guided, model)):
        t = scheduler.timesteps[0]
        results = scheduler.step(
            call(plain, t), t, plain, uncond_output=call(-plain, t), guidance_scale=2.0
        )
        outputs.append(results.prev_sample)
    assert torch.equal(*outputs)

    # Of three channels both keep all.
    x, t = start()[:, :3], torch.tensor(999)
    peer, same = Theirs(**config), DPMSolverMultistepScheduler(**config, numerics="diffusers")
    for scheduler in (peer, same):
        scheduler.set_timesteps(3)
    assert torch.equal(*(s.step(both(x, t), t, x).prev_sample for s in (peer, same)))


def test_third_order_of_the_sde() -> None:
    """Both signs; on a prediction that is smooth in time the right one agrees with order 2."""
    config = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    draws = noises(20)
    theirs = run(Theirs(**config), 20, noise=draws)
    fixed = run(DPMSolverMultistepScheduler(**config), 20, noise=draws)
    compat = DPMSolverMultistepScheduler(**config, compat=("third_order_sde",))
    assert error(run(compat, 20, noise=draws), theirs) <= 1e-5
    assert error(fixed, theirs) > 1e-3
    both = DPMSolverMultistepScheduler(**config, numerics="diffusers", compat=())
    assert error(run(both, 20, noise=draws), fixed) <= 1e-5

    def smooth(x: Tensor, t: Tensor) -> Tensor:
        return start() * torch.sin(t / 300)

    still: dict[str, Any] = {"noise": [torch.zeros(SHAPE)] * 50, "call": smooth}
    still["stop"] = -1  # the last step is of order 1
    config |= {"prediction_type": "sample", "use_lu_lambdas": True}
    second = run(DPMSolverMultistepScheduler(**{**config, "solver_order": 2}), 50, **still)
    right = error(run(DPMSolverMultistepScheduler(**config), 50, **still), second)
    assert right < 0.5 * error(run(Theirs(**config), 50, **still), second)


def test_repeated_levels() -> None:
    """As many steps as there are timesteps: one level repeats, and diffusers divides 0 by 0."""
    assert not run(Theirs(), 1000).isfinite().all()
    assert not run(DPMSolverMultistepScheduler(numerics="diffusers"), 1000).isfinite().all()
    result = run(DPMSolverMultistepScheduler(), 1000)
    assert error(result, run(DPMSolverMultistepScheduler(), 500)) < 0.02


def test_repeated_first_timestep() -> None:
    """diffusers starts at its second place, and its loop runs out of levels."""
    config = {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}
    with pytest.raises(IndexError):
        run(Theirs(**config), 7)
    with pytest.raises(ValueError, match="the schedule has 7 steps, got one more"):
        run(DPMSolverMultistepScheduler(**config, compat=("repeated_timesteps",)), 7)
    peer = Theirs(**config)
    peer.set_timesteps(7)
    peer.set_begin_index(0)
    x = start()
    for t in peer.timesteps:
        x = peer.step(model(x, t), t, x).prev_sample
    assert error(run(DPMSolverMultistepScheduler(**config), 7), x) <= 1e-5


def test_starts_in_the_middle() -> None:
    """Image to image: the first step has no earlier prediction, wherever it is."""
    for config in ({"solver_order": 3}, {"solver_order": 2, "lower_order_final": False}):
        results = []
        for scheduler in (
            Theirs(**config),
            DPMSolverMultistepScheduler(**config),
            DPMSolverMultistepScheduler(**config, numerics="diffusers"),
        ):
            for begin in (None, 8):
                scheduler.set_timesteps(20)
                if begin is not None:
                    scheduler.set_begin_index(begin)
                x = start()
                for t in scheduler.timesteps[8:]:
                    x = scheduler.step(model(x, t), t, x).prev_sample
                results.append(x)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[2], results[3])
        assert error(results[2], results[0]) <= 1e-5
        assert torch.equal(results[4], results[0])
        assert torch.equal(results[5], results[0])


def test_keyed_noise_belongs_to_samples() -> None:
    config = {"algorithm_type": "sde-dpmsolver++"}
    scheduler = DPMSolverMultistepScheduler(**config)
    scheduler.set_timesteps(5)
    outputs = [model(start(), t) for t in torch.arange(5)]
    whole, alone = start(), start()[1:2]
    for row, output in enumerate(outputs):
        t = scheduler.timesteps[row]
        whole = scheduler.step(output, t, whole, seed=3).prev_sample
    scheduler.set_timesteps(5)
    for row, output in enumerate(outputs):
        t = scheduler.timesteps[row]
        alone = scheduler.step(
            output[1:2], t, alone, seed=3, sample_ids=torch.tensor([1])
        ).prev_sample
    assert torch.equal(alone, whole[1:2])

    noise = [normal_noise(SHAPE, seed=3, step=row, stream=1) for row in range(5)]
    given = run(DPMSolverMultistepScheduler(**config), 5, noise=noise)
    keyed = run(DPMSolverMultistepScheduler(**config), 5, seed=3)
    assert error(keyed, given) <= 2e-6


def test_guidance_in_the_step() -> None:
    scheduler, plain = DPMSolverMultistepScheduler(), DPMSolverMultistepScheduler()
    for each in (scheduler, plain):
        each.set_timesteps(6)
    x = y = start()
    scales = torch.tensor([1.0, 3.0, 7.5])
    for t in scheduler.timesteps:
        x = scheduler.step(
            model(x, t), t, x, uncond_output=model(-x, t), guidance_scale=scales
        ).prev_sample
        mixed = torch.lerp(model(-y, t), model(y, t), scales[:, None, None, None])
        y = plain.step(mixed, t, y).prev_sample
    assert error(x, y) <= 1e-5
    with pytest.raises(ValueError, match="uncond_output needs numerics='exact'"):
        run(DPMSolverMultistepScheduler(numerics="diffusers"), 2, uncond_output=x)


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize(
    "config",
    [
        {"solver_order": 3},
        {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": True},
    ],
    ids=str,
)
def test_rows_on_the_device(config: dict[str, Any], begin: int) -> None:
    """Driven by row numbers that are tensors, as a loop of ops does: the same steps."""
    pair = [DPMSolverMultistepScheduler(**config) for _ in range(2)]
    for each in pair:
        each.set_timesteps(8)
        each.set_begin_index(begin)
    x = y = start()
    key = {"seed": 5} if "sde" in config.get("algorithm_type", "") else {}
    for row in range(begin, 8):
        t = pair[0].timesteps[row]
        x, prediction = pair[0]._advance(x, model(x, t), torch.tensor(row), **key)
        y = pair[1].step(model(y, t), t, y, **key).prev_sample
        assert torch.equal(x, y)
        assert prediction is not None


def test_coefficients_drive_the_op() -> None:
    """The table is public: `denoise_step` with it is the scheduler."""
    from vqkernels import denoise_step

    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(9)
    x, history = start(), []
    for row, t in enumerate(scheduler.timesteps):
        output = denoise_step(
            x,
            model(x, t),
            scheduler.coefficients,
            index=torch.tensor(row),
            history=history,
            want_prediction=True,
        )
        x, history = output.prev_sample, [output.prediction]
    assert torch.equal(x, run(DPMSolverMultistepScheduler(), 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_noise(dtype: torch.dtype) -> None:
    for layout, times in ((None, [0, 10, 999]), (10, None)):
        peer, same = Theirs(), DPMSolverMultistepScheduler(numerics="diffusers")
        exact = DPMSolverMultistepScheduler()
        if layout:
            for each in (peer, same, exact):
                each.set_timesteps(layout)
        t = torch.tensor(times) if times else peer.timesteps[[0, 4, 9]]
        x, z = start(dtype), noises(1)[0].to(dtype)
        expected = peer.add_noise(x, z, t)
        assert torch.equal(same.add_noise(x, z, t), expected)
        kept = peer.alphas_cumprod.double()[t][:, None, None, None]
        truth = kept.sqrt() * x.double() + (1 - kept).sqrt() * z.double()
        noisy = exact.add_noise(x, z, t)
        assert noisy.dtype == dtype
        bound = 1e-6 if dtype == torch.float32 else 2**-8
        assert (noisy.double() - truth).abs().max() <= bound * truth.abs().max()


def test_add_noise_before_set_timesteps() -> None:
    """diffusers takes the level of T - 1 - t there: data at t = 0 is nearly all noise."""
    x, z, t = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.tensor([0])
    faulty = Theirs().add_noise(x, z, t)
    assert faulty.max() < 0.01
    compat = DPMSolverMultistepScheduler(numerics="diffusers", compat=("training_sigma_order",))
    assert torch.equal(compat.add_noise(x, z, t), faulty)
    assert DPMSolverMultistepScheduler().add_noise(x, z, t).min() > 0.99
    rounded = DPMSolverMultistepScheduler(numerics="diffusers", compat=())
    assert rounded.add_noise(x, z, t).min() > 0.99


def test_add_noise_follows_the_place() -> None:
    """After set_begin_index or a step every sample gets the level of that place."""
    peer, ours = Theirs(), DPMSolverMultistepScheduler()
    x, z = start(), noises(1)[0]
    for scheduler in (peer, ours):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(4)
    for _ in range(2):
        t = peer.timesteps[[4]].expand(3)
        assert error(ours.add_noise(x, z, t), peer.add_noise(x, z, t)) <= 1e-5
        for scheduler in (peer, ours):
            scheduler.step(x, scheduler.timesteps[4], x)


def test_add_noise_per_token() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(10)
    x, z = torch.randn(2, 2, 6, 5)
    t = scheduler.timesteps[torch.randint(0, 10, (2, 6))]
    noisy = scheduler.add_noise(x, z, t)
    for i, j in itertools.product(range(2), range(6)):
        one = scheduler.add_noise(x[i, j][None], z[i, j][None], t[i, j][None])
        assert torch.equal(noisy[i, j], one[0])


def test_config_goes_both_ways(tmp_path: Any) -> None:
    ours = DPMSolverMultistepScheduler(solver_order=3, use_karras_sigmas=True)
    ours.save_pretrained(tmp_path)
    theirs = Theirs.from_pretrained(tmp_path)
    assert theirs.config.solver_order == 3
    assert theirs.config.use_karras_sigmas
    theirs.save_pretrained(tmp_path / "theirs")
    again = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "theirs")
    for name, value in ours.config.items():
        if not name.startswith("_"):
            assert again.config[name] == value, name
    from_unipc = DPMSolverMultistepScheduler.from_config(diffusers.UniPCMultistepScheduler().config)
    assert from_unipc.config.solver_type == "midpoint"
    assert torch.equal(ours.timesteps, Theirs().timesteps)
    assert ours.init_noise_sigma == 1
    assert len(ours) == 1000


def test_same_defaults_as_diffusers() -> None:
    theirs, ours = dict(Theirs().config), dict(DPMSolverMultistepScheduler().config)
    for config in (theirs, ours):
        for name in ("_class_name", "_diffusers_version", "_use_default_values"):
            config.pop(name, None)
    assert list(ours) == list(theirs)
    assert ours == theirs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"solver_order": 4}, r"solver_order must be 1, 2 or 3, got 4"),
        ({"algorithm_type": "ddim"}, r"algorithm_type must be one of .*got 'ddim'"),
        ({"solver_type": "rk4"}, r"solver_type must be one of .*got 'rk4'"),
        ({"algorithm_type": "dpmsolver"}, r"final_sigmas_type must be 'sigma_min' .*got 'zero'"),
        ({"final_sigmas_type": "one"}, r"final_sigmas_type must be one of .*got 'one'"),
        ({"timestep_spacing": "even"}, r"timestep_spacing must be one of .*got 'even'"),
        ({"variance_type": "fixed"}, r"variance_type must be None.*got 'fixed'"),
        ({"time_shift_type": "linear"}, r"time_shift_type must be one of 'exponential'"),
        (
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            r"only one of .*got use_karras_sigmas and use_beta_sigmas",
        ),
        (
            {"use_flow_sigmas": True, "use_lu_lambdas": True},
            r"use_flow_sigmas can't be given with use_lu_lambdas=True",
        ),
    ],
    ids=str,
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPMSolverMultistepScheduler(**config)


@pytest.mark.parametrize("numerics", ["exact", "diffusers"])
def test_bad_calls(numerics: str) -> None:
    scheduler = DPMSolverMultistepScheduler(numerics=numerics)
    x = start()
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 999, x)
    for steps in (0, -1, 1001, 2.5):
        with pytest.raises(ValueError, match=f"num_inference_steps must .*got {steps}"):
            scheduler.set_timesteps(steps)
    with pytest.raises(ValueError, match="give num_inference_steps or timesteps, got neither"):
        scheduler.set_timesteps()
    with pytest.raises(ValueError, match="give num_inference_steps or timesteps, got both"):
        scheduler.set_timesteps(3, timesteps=[3, 2, 1])
    with pytest.raises(ValueError, match="timesteps must be descending"):
        scheduler.set_timesteps(timesteps=[5, 800])
    with pytest.raises(ValueError, match="mu goes with use_dynamic_shifting=True"):
        scheduler.set_timesteps(3, mu=1.0)
    with pytest.raises(ValueError, match="must be below 1000 with timestep_spacing='leading'"):
        DPMSolverMultistepScheduler(timestep_spacing="leading").set_timesteps(1000)
    with pytest.raises(ValueError, match="timesteps can't be given with use_lu_lambdas"):
        DPMSolverMultistepScheduler(use_lu_lambdas=True).set_timesteps(timesteps=[3])
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="timestep must be one of the 2 of the schedule"):
        scheduler.step(x, 998, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="the schedule has 2 steps, got one more"):
        scheduler.step(x, 500, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="timesteps must be of the schedule's 2"):
        scheduler.add_noise(x, x, torch.tensor([999, 3, 999]))


def test_exact_steps_ask_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a begin index, no value of a tensor reaches the host during the loop."""
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(0)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a step asked a tensor for its value")

    x = start()
    outputs = [model(x, t) for t in scheduler.timesteps]
    seed = torch.tensor(3)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, forbidden)
    for output, t in zip(outputs, scheduler.timesteps, strict=True):
        x = scheduler.step(output, t, x, seed=seed).prev_sample
    assert scheduler.step_index == 5
