"""What schedulers of a beta schedule share: levels, noising, the place in the schedule, errors."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from _helpers.precision import assert_as_good_as_eager
from _peers import (
    BOUND,
    NoReads,
    distance,
    float64_for_float32,
    generator,
    loop,
    start,
    toy_model,
)
from torch import Tensor

from vqkernels import schedulers
from vqkernels.schedulers import DDIMScheduler, DDPMScheduler, LCMScheduler
from vqkernels.schedulers._betas import BETA_SCHEDULES

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler", "LCMScheduler"]
every_class = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
)
def test_levels(schedule: str, zero_snr: bool) -> None:
    arguments = {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}
    theirs = diffusers.DDPMScheduler(**arguments)
    as_theirs = DDPMScheduler(**arguments, numerics="diffusers")
    exact = DDPMScheduler(**arguments)
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        expected = getattr(theirs, name)
        assert torch.equal(getattr(as_theirs, name), expected)
        assert getattr(exact, name).dtype == expected.dtype
        assert torch.allclose(getattr(exact, name).double(), expected.double(), atol=3e-6)
    if zero_snr:
        assert exact.alphas_cumprod[-1] == 0
    assert set(BETA_SCHEDULES) >= {schedule}


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler"])
def test_noising_follows_diffusers(name: str) -> None:
    x0, noise = start((6, 3, 8, 8)), start((6, 3, 8, 8), seed=8)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    theirs = getattr(diffusers, name)()
    exact = getattr(schedulers, name)()
    as_theirs = getattr(schedulers, name)(numerics="diffusers")
    for method in ("add_noise", "get_velocity"):
        expected = getattr(theirs, method)(x0, noise, t)
        assert distance(getattr(exact, method)(x0, noise, t), expected) < BOUND
        assert torch.equal(getattr(as_theirs, method)(x0, noise, t), expected)
        for dtype in (torch.bfloat16, torch.float16):
            halves = (x0.to(dtype), noise.to(dtype), t)
            rounded = getattr(as_theirs, method)(*halves)
            assert torch.equal(rounded, getattr(theirs, method)(*halves))


def test_the_fault_of_vanishing_noise() -> None:
    """alphas_cumprod of the first timesteps is 1 in bf16: diffusers adds no noise there."""
    x0, noise = torch.ones(4, 100).bfloat16(), start((4, 100)).bfloat16()
    t = torch.tensor([0, 1, 2, 3])
    expected = DDIMScheduler().add_noise(x0.double(), noise.double(), t)
    lost = diffusers.DDIMScheduler().add_noise(x0, noise, t)
    assert torch.equal(lost[0], x0[0])
    for kept in (DDIMScheduler(), DDIMScheduler(numerics="diffusers", compat=())):
        noised = kept.add_noise(x0, noise, t)
        assert torch.equal(noised, expected.bfloat16())
        assert noised[0].float().std() > 0.007
    assert torch.equal(DDIMScheduler(compat=("bf16_noise",)).add_noise(x0, noise, t), lost)


def test_timesteps_of_any_shape() -> None:
    scheduler = DDIMScheduler()
    x0, noise = start((2, 5, 4)), start((2, 5, 4), seed=8)
    t = torch.randint(0, 1000, (2, 5), generator=generator())
    alpha = scheduler._levels[0][t][..., None]
    sigma = scheduler._levels[1][t][..., None]
    expected = alpha * x0 + sigma * noise
    assert distance(scheduler.add_noise(x0, noise, t), expected) < 1e-6
    expected = alpha * noise - sigma * x0
    assert distance(scheduler.get_velocity(x0, noise, t), expected) < 1e-6
    one = scheduler.add_noise(x0, noise, torch.tensor(7))
    assert torch.equal(one, scheduler.add_noise(x0, noise, torch.tensor([7, 7])))
    assert torch.equal(one, scheduler.add_noise(x0, noise, torch.full((2, 1, 1), 7)))


def test_gradients() -> None:
    """Through noising; through steps in diffusers' arithmetic, as guidance by a loss needs them."""
    scheduler, x = DDIMScheduler(), start().requires_grad_()
    noised = scheduler.add_noise(x, torch.zeros_like(x), torch.tensor([10, 900]))
    (grad,) = torch.autograd.grad(noised.sum(), x)
    alpha = scheduler.alphas_cumprod[[10, 900]].sqrt()
    assert torch.allclose(grad, alpha[:, None, None, None].expand_as(x))
    for numerics, has_one in (("exact", False), ("diffusers", True)):
        scheduler = DDIMScheduler(clip_sample=False, numerics=numerics)
        scheduler.set_timesteps(4)
        data = scheduler.step(torch.zeros_like(x), 500, x).pred_original_sample
        assert data.requires_grad == has_one


def test_noising_refuses_what_does_not_fit() -> None:
    scheduler = DDIMScheduler()
    x0 = start((2, 5, 4))
    for t, error, message in (
        (torch.tensor([0, 1000]), ValueError, r"timesteps must lie in .*from 0 to 1000"),
        (torch.tensor([-1, 4]), ValueError, r"timesteps must lie in .*from -1 to 4"),
        (torch.tensor([1, 2, 3]), ValueError, r"timesteps must be \[2\], or .*got \[3\]"),
        (torch.tensor([1.0, 2.0]), TypeError, "timesteps must be int64 or int32"),
        (7, TypeError, "timesteps must be a torch.Tensor, got int"),
    ):
        with pytest.raises(error, match=message):
            scheduler.add_noise(x0, x0, t)
    with pytest.raises(ValueError, match=r"noise must have original_samples's shape"):
        scheduler.add_noise(x0, x0[:, :3], torch.tensor([1, 2]))


@every_class
def test_bad_constructor_arguments(name: str) -> None:
    make = getattr(schedulers, name)
    for arguments, message in (
        ({"num_train_timesteps": 0}, "num_train_timesteps must be at least 1, got 0"),
        ({"beta_schedule": "cosine"}, "beta_schedule must be one of .*, got 'cosine'"),
        ({"prediction_type": "noise"}, "prediction_type must be one of .*, got 'noise'"),
        ({"beta_end": 2.0, "beta_schedule": "linear"}, "beta_start and beta_end must give betas"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas must hold .* = 1000 values, got shape \[2"),
        (
            {"trained_betas": [0.1, float("nan")], "num_train_timesteps": 2},
            r"trained_betas must give betas in \[0, 1\], got values from nan to nan",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make(**arguments)


@every_class
def test_bad_schedules_and_steps(name: str) -> None:
    make = getattr(schedulers, name)
    scheduler, x = make(), start()
    if name != "DDPMScheduler":
        with pytest.raises(ValueError, match="call set_timesteps"):
            scheduler.step(x, 1, x)
    for steps in (0, -3, 1001, 2.5, True):
        with pytest.raises(ValueError, match="num_inference_steps must"):
            scheduler.set_timesteps(steps)
    if name != "LCMScheduler":
        with pytest.raises(ValueError, match=r"timestep_spacing must be one of .*, got 'even'"):
            make(timestep_spacing="even").set_timesteps(5)
        with pytest.raises(ValueError, match=r"steps_offset must leave .*, got 300"):
            make(steps_offset=300).set_timesteps(5)
        with pytest.raises(ValueError, match=r"steps_offset must leave .*, got -1, .* 799 to -1"):
            make(steps_offset=-1).set_timesteps(5)
    scheduler.set_timesteps(5)
    for t in (12345, torch.tensor(12345), -1):
        with pytest.raises(ValueError, match=r"timestep must be one of the 5 of the schedule"):
            scheduler.step(x, t, x)
    with pytest.raises(ValueError, match=r"timestep must be one value, got shape \[2\]"):
        scheduler.step(x, torch.tensor([1, 2]), x)
    t = scheduler.timesteps[0]
    with pytest.raises(ValueError, match="model_output must have sample's shape"):
        scheduler.step(x[:, :2], t, x)


def test_reads_are_noticed() -> None:
    x = torch.ones(())
    for read in (x.item, lambda: bool(x > 0), lambda: torch.tensor(3.0), x.double):
        with NoReads(), pytest.raises(AssertionError, match="in a step"):
            read()


@every_class
def test_steps_do_not_read_tensors(name: str) -> None:
    """Neither with the schedule's own timesteps nor, given a place to begin, with copies."""
    scheduler, x = getattr(schedulers, name)(), start()
    options = {} if name == "DDIMInverseScheduler" else {"seed": torch.tensor(3)}
    if name == "DDIMScheduler":
        options["eta"] = 1.0
    for copied in (False, True):
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(0)
        if name == "DDIMScheduler":
            scheduler._tabulate(eta=1.0)  # otherwise the first step's work, on the host
        timesteps = scheduler.timesteps.clone() if copied else scheduler.timesteps
        expected = None
        for t in timesteps:
            output = toy_model(x, t)
            with NoReads():
                expected = scheduler.step(output, t, x, **options).prev_sample
        assert scheduler.step_index == 4
        last = scheduler.timesteps[3]
        scheduler.set_begin_index(3)
        scheduler._step_index = None
        assert torch.equal(scheduler.step(output, int(last), x, **options).prev_sample, expected)


def test_an_element_of_timesteps_tells_its_row() -> None:
    """By where it lies: steps may come in any order without a device being asked."""
    scheduler, x = DDIMScheduler(), start()
    scheduler.set_timesteps(10)
    for row in (7, 2, 2, 9):
        t = scheduler.timesteps[3:][row - 3] if row > 3 else scheduler.timesteps[row]
        with NoReads():
            found = scheduler.step(x, t, x).prev_sample
        assert torch.equal(found, scheduler.step(x, int(t), x).prev_sample)
        assert torch.equal(found, scheduler.step(x, t.clone(), x).prev_sample)
        assert scheduler.step_index == row + 1


@every_class
def test_low_precision_is_rounded_once(name: str) -> None:
    """A step in half precision is the float32 step, rounded; a float32 state takes half-precision
    outputs."""
    scheduler = getattr(schedulers, name)(prediction_type="v_prediction")
    options = {} if name == "DDIMInverseScheduler" else {"seed": 3}

    def step(output: Tensor, x: Tensor) -> Any:
        scheduler.set_timesteps(5)
        return scheduler.step(output, scheduler.timesteps[1], x, **options)

    for dtype in (torch.bfloat16, torch.float16):
        x = start().to(dtype)
        output = toy_model(x, 600)
        wide = step(output.float(), x.float())
        for mine, true in zip(step(output, x).to_tuple(), wide.to_tuple(), strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, true.to(dtype))
        assert torch.equal(step(output, x.float())[0], wide[0])


@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loops(name: str, dtype: torch.dtype) -> None:
    """As near to float64 as diffusers is in that dtype; its very bits under numerics="diffusers",
    whatever the dtypes of state and output."""
    arguments = {"prediction_type": "v_prediction", "clip_sample": True}
    options = {} if name == "DDIMInverseScheduler" else {"generator": None}

    def run(package: Any, x: Tensor, model: Any = toy_model, **more: Any) -> Tensor:
        scheduler = getattr(package, name)(**arguments, **more)
        scheduler.set_timesteps(6)
        if options:
            options["generator"] = generator()
        return loop(scheduler, x, model, **options)

    def half(x: Tensor, t: Tensor) -> Tensor:
        return toy_model(x.to(dtype), t)

    x = start().to(dtype)
    theirs = run(diffusers, x)
    as_theirs = run(schedulers, x, numerics="diffusers")
    assert as_theirs.dtype == theirs.dtype == dtype
    assert torch.equal(as_theirs, theirs)
    mixed = run(schedulers, x.float(), half, numerics="diffusers")
    assert torch.equal(mixed, run(diffusers, x.float(), half))

    if name in ("DDPMScheduler", "LCMScheduler"):  # half-precision normals are other numbers
        return
    with float64_for_float32():
        exact = run(diffusers, x.double())
    assert_as_good_as_eager(run(schedulers, x), theirs, exact)


def test_steps_compile() -> None:
    """Into one graph, where nothing has to be read: with a place to begin, or numbers for t."""
    scheduler, x = DDIMScheduler(), start()
    scheduler.set_timesteps(3)
    expected = loop(scheduler, x, lambda x, t: x.tanh())

    @torch.compile(fullgraph=True)
    def step(x: Tensor, t: Tensor | int) -> Tensor:
        return scheduler.step(x.tanh(), t, x).prev_sample

    for timesteps in (scheduler.timesteps, scheduler.timesteps.tolist()):
        scheduler.set_timesteps(3)
        scheduler.set_begin_index(0)
        found = x
        for t in timesteps:
            found = step(found, t)
        assert distance(found, expected) < BOUND


@every_class
def test_the_protocol_of_one_step(name: str) -> None:
    """`_advance` takes the row as a number or as a tensor; the table is public."""
    scheduler, x = getattr(schedulers, name)(prediction_type="v_prediction"), start()
    scheduler.set_timesteps(6)
    assert scheduler.coefficients.shape == (6, 22)
    output = toy_model(x, 300)
    by_step = scheduler.step(
        output, scheduler.timesteps[2], x, **({} if name == "DDIMInverseScheduler" else {"seed": 5})
    )
    for index in (2, torch.tensor(2)):
        previous, prediction = scheduler._advance(x, output, index, seed=5)
        assert torch.equal(previous, by_step[0])
        assert torch.equal(prediction, by_step[1])
    assert scheduler._advance(x, output, 2, seed=5, want_prediction=False)[1] is None


@every_class
def test_samples_do_not_depend_on_their_batch(name: str) -> None:
    x = start((5, 3, 8, 8))
    scheduler = getattr(schedulers, name)(clip_sample=True)

    def run(x: Tensor) -> Tensor:
        scheduler.set_timesteps(5)
        options = {} if name == "DDIMInverseScheduler" else {"sample_ids": ids[: len(x)], "seed": 1}
        if name == "DDIMScheduler":
            options["eta"] = 0.5
        return loop(scheduler, x, **options)

    ids = torch.arange(5)
    whole = run(x)
    assert torch.equal(run(x[:1]), whole[:1])
    assert torch.equal(run(x[:3]), whole[:3])


def test_outputs() -> None:
    scheduler, x = DDIMScheduler(), start()
    scheduler.set_timesteps(4)
    output = scheduler.step(x, 500, x)
    assert output[0] is output.prev_sample is output["prev_sample"] is output.to_tuple()[0]
    assert output[1] is output.pred_original_sample
    as_tuple = scheduler.step(x, 500, x, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[1], output[1])
    assert len(scheduler.step(x, 500, x, want_prediction=False).to_tuple()) == 1
    assert scheduler.scale_model_input(x, 500) is x
    assert (scheduler.order, scheduler.init_noise_sigma) == (1, 1.0)


def test_one_source_of_noise() -> None:
    x = start()
    for scheduler in (DDPMScheduler(), LCMScheduler()):
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[0]
        with pytest.raises(ValueError, match="give one of variance_noise, generator and seed"):
            scheduler.step(x, t, x, generator(), seed=3)
        with pytest.raises(ValueError, match="sample_ids goes with seed"):
            scheduler.step(x, t, x, sample_ids=torch.arange(2))
        with pytest.raises(ValueError, match=r"generator must be one or one a sample \(2\), got 3"):
            scheduler.step(x, t, x, [generator(), generator(), generator()])
        given = scheduler.step(x, t, x, variance_noise=x).prev_sample
        assert given.isfinite().all()
