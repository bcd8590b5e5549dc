"""What schedulers on levels share: noising, keyed noise, guidance, the place in the schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _helpers.precision import assert_as_good_as_eager
from _loops import ours, theirs
from _peers import BOUND, NoReads, distance, float64_for_float32, generator, loop, start, toy_model
from torch import Tensor

import vqkernels
from vqkernels import schedulers

pytestmark = pytest.mark.usefixtures("one_thread")

EXPLODING = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EDMEulerScheduler",
]
FLOWS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
CHURNED = [
    "EulerDiscreteScheduler",
    "EDMEulerScheduler",
    "FlowMatchHeunDiscreteScheduler",
]
every_class = pytest.mark.parametrize("name", EXPLODING + FLOWS)


def noisy(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config and options of `step` with which this class draws noise in each step."""
    config = {"stochastic_sampling": True} if name == "FlowMatchEulerDiscreteScheduler" else {}
    return config, {"s_churn": 4.0} if name in CHURNED else {}


def mix(scheduler: Any, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    method = scheduler.add_noise if hasattr(scheduler, "add_noise") else scheduler.scale_noise
    return method(data, noise, t) if hasattr(scheduler, "add_noise") else method(data, t, noise)


@pytest.mark.parametrize("name", [*EXPLODING, FLOWS[0]])
@pytest.mark.parametrize("laid_out", [False, True])
def test_noising_follows_diffusers(name: str, laid_out: bool) -> None:
    make = {"laid_out": laid_out} | ({"num_inference_steps": 9} if laid_out else {})
    peer = theirs(name, {}, **make)
    x0, noise = start((6, 3, 8, 8)), start((6, 3, 8, 8), seed=8)
    places = torch.linspace(0, len(peer.timesteps) - 1, 6).long()
    t = peer.timesteps[places]
    exact = ours(name, {}, **make)
    rounded = ours(name, {}, numerics="diffusers", **make)
    expected = mix(peer, x0, noise, t)
    assert distance(mix(exact, x0, noise, exact.timesteps[places]), expected) < BOUND
    assert torch.equal(mix(rounded, x0, noise, t), expected)
    for dtype in (torch.bfloat16, torch.float16):
        halves = x0.to(dtype), noise.to(dtype), t
        assert torch.equal(mix(rounded, *halves), mix(peer, *halves))


def test_noising_by_flow_heun_follows_diffusers() -> None:
    """diffusers noises a batch at one timestep."""
    name = "FlowMatchHeunDiscreteScheduler"
    x0, noise = start(), start(seed=8)
    for row in (0, 1, 4):
        peer = theirs(name, {}, num_inference_steps=9)
        expected = peer.scale_noise(x0, peer.timesteps[row], noise)
        for numerics in ("exact", "diffusers"):
            mine = ours(
                name, {}, numerics=numerics, compat=("double_shift",), num_inference_steps=9
            )
            found = mine.scale_noise(x0, mine.timesteps[row], noise)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*EXPLODING, FLOWS[0]])
def test_noising_within_a_loop_is_that_of_its_step(name: str) -> None:
    x0, noise = start(), start(seed=8)
    peer, mine = (make(name, {}, num_inference_steps=9) for make in (theirs, ours))
    peer.set_begin_index(2)
    mine.set_begin_index(2)
    t = mine.timesteps[:1].expand(2)  # not the step's
    assert distance(mix(mine, x0, noise, t), mix(peer, x0, noise, t)) < BOUND
    for scheduler in (peer, mine):
        now = scheduler.timesteps[2]
        scheduler.step(toy_model(x0, now), now, x0)
    assert distance(mix(mine, x0, noise, t), mix(peer, x0, noise, t)) < BOUND


@every_class
def test_half_precision_keeps_its_levels(name: str) -> None:
    """diffusers rounds sigma to the samples' dtype, two or three digits in bf16."""
    x0, noise = start((4, 500)).bfloat16(), start((4, 500), seed=8).bfloat16()
    exact = ours(name, {}, num_inference_steps=50)
    t = exact.timesteps[torch.tensor([2, 10, 20, 40])]
    wide = mix(exact, x0.float(), noise.float(), t)
    kept = mix(exact, x0, noise, t)
    assert torch.equal(kept, wide.bfloat16())
    faulty = ours(name, {}, compat=("bf16_noise",), num_inference_steps=50)
    lost = mix(faulty, x0, noise, t)
    assert (lost - wide).abs().mean() > 1.3 * (kept - wide).abs().mean()


@every_class
def test_timesteps_of_any_shape(name: str) -> None:
    scheduler = ours(name, {}, num_inference_steps=20)
    x0, noise = start((2, 5, 4)), start((2, 5, 4), seed=8)
    rows = torch.randint(0, 20, (2, 5), generator=generator())
    t = scheduler.timesteps[rows]
    tokens = mix(scheduler, x0, noise, t)
    for i in range(2):
        for j in range(5):
            alone = mix(scheduler, x0[i : i + 1, j], noise[i : i + 1, j], t[i, j])
            assert torch.equal(tokens[i, j], alone[0])
    one = mix(scheduler, x0, noise, t[0, 0])
    assert torch.equal(one, mix(scheduler, x0, noise, t[0, 0].expand(2)))
    assert torch.equal(one, mix(scheduler, x0, noise, t[0, 0].expand(2, 1, 1)))
    assert torch.equal(one, mix(scheduler, x0, noise, float(t[0, 0])))


@every_class
def test_noising_refuses_what_does_not_fit(name: str) -> None:
    scheduler, x0 = ours(name, {}, num_inference_steps=20), start((2, 5, 4))
    inside = scheduler.timesteps[:1]
    for t, error, message in (
        (torch.tensor([float(inside), 12345.0]), ValueError, "timesteps must be of the schedule's"),
        (torch.tensor([float("nan"), 1.0]), ValueError, "timesteps must be of the .*got nan"),
        (inside.expand(3), ValueError, r"alpha must be \[2\], or .*got \[3\]"),
        (-7.5, ValueError, "timesteps must be of the schedule's .*, got -7.5"),
        ("7", TypeError, "timesteps must be a torch.Tensor, got str"),
    ):
        with pytest.raises(error, match=message):
            mix(scheduler, x0, x0, t)
    with pytest.raises(ValueError, match="noise must have x0's shape"):
        mix(scheduler, x0, x0[:, :3], inside.expand(2))


@every_class
def test_keyed_noise_is_that_of_normal_noise(name: str) -> None:
    """Keyed by sample, step and stream 1; samples do not depend on their batch."""
    config, options = noisy(name)
    x, ids = start((5, 3, 8, 8)), torch.tensor([3, 1, 4, 15, 9])
    scheduler = ours(name, config, num_inference_steps=4)

    def run(part: slice) -> Tensor:
        scheduler.set_timesteps(4)
        keyed = {} if name == "HeunDiscreteScheduler" else {"seed": 7, "sample_ids": ids[part]}
        return loop(scheduler, x[part], **options, **keyed)

    whole = run(slice(None))
    assert torch.equal(run(slice(0, 2)), whole[:2])
    assert torch.equal(run(slice(2, 5)), whole[2:])
    if name == "HeunDiscreteScheduler":
        return
    given = ours(name, config, num_inference_steps=4)
    state = x
    for row, t in enumerate(given.timesteps):
        noise = vqkernels.normal_noise(x.shape, seed=7, sample_ids=ids, step=row, stream=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(given, "_noise", lambda *_, _noise=noise, **__: {"noise": _noise})
            output = toy_model(given.scale_model_input(state, t), t)
            state = given.step(output, t, state, **options).prev_sample
    torch.testing.assert_close(state, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in EXPLODING + FLOWS if name[:4] != "Heun"])
def test_keyed_noise_under_diffusers_numerics(name: str) -> None:
    config, options = noisy(name)
    results = []
    for numerics in ("exact", "diffusers"):
        scheduler = ours(name, config, numerics=numerics, compat=(), num_inference_steps=6)
        x = start() * float(scheduler.init_noise_sigma)
        results.append(loop(scheduler, x, **options, seed=3))
    assert distance(*results) < 1e-4


@every_class
def test_low_precision_is_rounded_once(name: str) -> None:
    """A step in half precision is the float32 step, rounded; a float32 state takes half-precision
    outputs."""
    config = {"stochastic_sampling": True} if name == FLOWS[0] else {}
    keyed = {} if name == "HeunDiscreteScheduler" else {"seed": 3}

    def step(output: Tensor, x: Tensor) -> Any:
        scheduler = ours(name, config, num_inference_steps=5)
        return scheduler.step(output, scheduler.timesteps[0], x, **keyed)

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
    """diffusers' very bits under its numerics, whatever the dtypes of state and output."""
    config, options = noisy(name)

    def run(make: Any, x: Tensor, model: Any = toy_model, **more: Any) -> Tensor:
        scheduler = make(name, config, num_inference_steps=6, **more)
        if name != "HeunDiscreteScheduler":
            options["generator"] = generator()
        return loop(
            scheduler, x * float(getattr(scheduler, "init_noise_sigma", 1)), model, **options
        )

    def half(x: Tensor, t: Tensor) -> Tensor:
        return toy_model(x.to(dtype), t)

    x = start().to(dtype)
    for state, model in ((x, half), (x.float(), half), (x, toy_model)):
        expected = run(theirs, state, model)
        found = run(ours, state, model, numerics="diffusers")
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


# Not the ancestral one: it draws half-precision normals, which are other numbers.
@pytest.mark.parametrize("name", [name for name in EXPLODING + FLOWS if "Ancestral" not in name])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loops_are_as_near_to_float64(name: str, dtype: torch.dtype) -> None:
    x = start().to(dtype)
    peer = loop(theirs(name, {}, num_inference_steps=6), x)
    with float64_for_float32():
        exact = loop(theirs(name, {}, num_inference_steps=6), x.double())
    mine = ours(name, {}, compat=("double_shift",), num_inference_steps=6)
    assert_as_good_as_eager(loop(mine, x), peer, exact)


@every_class
def test_guidance_in_the_step(name: str) -> None:
    config, options = noisy(name)
    if name != "HeunDiscreteScheduler":
        options["seed"] = 2
    x, cond, uncond = start(), start(seed=6), start(seed=7)

    def step(output: Tensor, **guidance: Any) -> Tensor:
        scheduler = ours(name, config, num_inference_steps=4)
        t = scheduler.timesteps[0]
        return scheduler.step(output, t, x, **options, **guidance).prev_sample

    guided = step(cond, uncond_output=uncond, guidance_scale=3.0)
    combined = uncond + 3 * (cond - uncond)
    assert distance(guided, step(combined)) < BOUND
    own = step(cond, uncond_output=uncond, guidance_scale=torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(own[0], guided[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own[1], step(cond)[1], rtol=1e-6, atol=1e-6)
    rescaled = step(cond, uncond_output=uncond, guidance_scale=3.0, guidance_rescale=0.7)
    ratio = cond.flatten(1).std(1) / combined.flatten(1).std(1)
    scaled = combined * (0.7 * ratio + 0.3)[:, None, None, None]
    assert distance(rescaled, step(scaled)) < BOUND
    scheduler = ours(name, config, numerics="diffusers", num_inference_steps=4)
    with pytest.raises(ValueError, match="uncond_output needs numerics='exact'"):
        scheduler.step(cond, scheduler.timesteps[0], x, uncond_output=uncond)


@every_class
def test_steps_do_not_read_tensors(name: str) -> None:
    config, options = noisy(name)
    scheduler, x = ours(name, config, num_inference_steps=4), start()
    if name != "HeunDiscreteScheduler":
        options["seed"] = torch.tensor(3)
    for copied in (False, True):
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(0)
        if name in CHURNED:
            scheduler._tabulate(s_churn=4.0)  # otherwise the first step's work, on the host
        times = scheduler.timesteps.clone() if copied else scheduler.timesteps
        for t in times:
            output = toy_model(x, t)
            with NoReads():
                scheduler.step(output, t, x, **options)
        assert scheduler.step_index == len(times)


@every_class
def test_the_protocol_of_one_step(name: str) -> None:
    """`_advance` takes the row as a number or as a tensor; the table is public."""
    config, _ = noisy(name)
    scheduler, x = ours(name, config, num_inference_steps=6), start()
    assert scheduler.coefficients.shape == (len(scheduler.timesteps), 22)
    output = toy_model(x, 300)
    options = {} if name == "HeunDiscreteScheduler" else {"seed": 5}
    scheduler.set_begin_index(2)
    expected = scheduler.step(output, scheduler.timesteps[2], x, **options).prev_sample
    keyed = {"seed": 5} if name in (EXPLODING[1], FLOWS[0]) else {}
    for index in (2, torch.tensor(2)):
        scheduler.set_timesteps(6)
        previous, prediction = scheduler._advance(x, output, index, **keyed)
        assert torch.equal(previous, expected)
        assert prediction is not None
        scheduler.set_timesteps(6)
        assert scheduler._advance(x, output, index, **keyed, want_prediction=False)[1] is None


@pytest.mark.parametrize("name", FLOWS)
def test_the_prediction_of_a_flow(name: str) -> None:
    scheduler = ours(name, {}, num_inference_steps=6)
    x, output = start(), start(seed=6)
    _, prediction = scheduler._advance(x, output, 2)
    torch.testing.assert_close(prediction, x - scheduler.sigmas[2] * output)


@every_class
def test_steps_that_cannot_be(name: str) -> None:
    x = start()
    for numerics in ("exact", "diffusers"):
        scheduler = ours(name, {}, numerics=numerics, laid_out=False)
        t = scheduler.timesteps[0]
        with pytest.raises(ValueError, match="call set_timesteps"):
            scheduler.step(x, t, x)
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match=r"timestep must be one of the .* of the schedule"):
            scheduler.step(x, torch.tensor(12345.5), x)
        with pytest.raises(ValueError, match=r"timestep must be one of the .* of the schedule"):
            scheduler.scale_model_input(x, 12345.5) if name in EXPLODING else scheduler.step(
                x, -1.5, x
            )
    t = scheduler.timesteps[0]
    if name != "HeunDiscreteScheduler":
        for integer in (0, torch.tensor(0)):
            with pytest.raises(ValueError, match="which are floating point, got the integer 0"):
                scheduler.step(x, integer, x)
        config, options = noisy(name)
        scheduler = ours(name, config, num_inference_steps=5)
        with pytest.raises(ValueError, match=r"give one of .*generator and seed"):
            scheduler.step(x, t, x, generator=generator(), seed=3, **options)
    scheduler = ours(name, {}, num_inference_steps=5)
    with pytest.raises(ValueError, match="model_output must have sample's shape"):
        scheduler.step(x[:, :2], t, x)
    scheduler.set_timesteps(5)
    loop(scheduler, x)
    with pytest.raises(ValueError, match=r"the schedule has .* steps, got one more"):
        scheduler.step(x, t, x)


@pytest.mark.parametrize("name", CHURNED)
def test_churn_that_cannot_be(name: str) -> None:
    scheduler, x = ours(name, {}, num_inference_steps=5), start()
    for churn in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="s_churn must be at least 0"):
            scheduler.step(x, scheduler.timesteps[0], x, s_churn=churn)


@pytest.mark.parametrize("name", [EXPLODING[0], "HeunDiscreteScheduler", FLOWS[0]])
def test_steps_compile(name: str) -> None:
    """A whole step, model input and model included, into one graph."""
    scheduler, x = ours(name, {}, num_inference_steps=2), start()
    expected = loop(scheduler, x, lambda x, t: x.tanh())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor, t: Tensor) -> Tensor:
        return scheduler.step(scheduler.scale_model_input(x, t).tanh(), t, x).prev_sample

    scheduler.set_timesteps(2)
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        x = step(x, t)
    assert distance(x, expected) < BOUND


@pytest.mark.parametrize("name", CHURNED)
def test_sampling_forgets_the_churn_of_earlier_steps(name: str) -> None:
    scheduler, x = ours(name, {}, num_inference_steps=5), start()

    def drawn() -> Tensor:
        return schedulers.sample(toy_model_of_batches, scheduler, x.shape, seed=3)

    expected = drawn()
    scheduler.set_timesteps(5)
    scheduler.step(x, scheduler.timesteps[0], x, s_churn=4.0, seed=1)
    assert torch.equal(drawn(), expected)


def toy_model_of_batches(x: Tensor, t: Tensor) -> Tensor:
    return toy_model(x, t[0])


@every_class
def test_outputs(name: str) -> None:
    scheduler, x = ours(name, {}, num_inference_steps=5), start()
    t = scheduler.timesteps[0]
    output = scheduler.step(x, t, x)
    peer = theirs(name, {}, num_inference_steps=5).step(x, t, x)
    assert type(output).__name__ == type(peer).__name__
    assert set(vars(output)) == set(vars(peer))
    scheduler.set_timesteps(5)
    as_tuple = scheduler.step(x, t, x, return_dict=False)
    assert len(as_tuple) == len(output.to_tuple())
    assert scheduler.order == getattr(schedulers, name).order
    assert len(scheduler) == 1000


@every_class
def test_img2img_begins_in_the_middle(name: str) -> None:
    """Without a begin index the first timestep tells the place; of repetitions, the second."""
    peer, mine = (make(name, {}, num_inference_steps=8) for make in (theirs, ours))
    x = start()
    row = 4
    assert float(mine.timesteps[row]) == pytest.approx(float(peer.timesteps[row]), rel=1e-6)
    results = []
    for scheduler in (peer, mine):
        t = scheduler.timesteps[row]
        options = {} if name == "HeunDiscreteScheduler" else {"generator": generator()}
        results.append(scheduler.step(toy_model(x, 100), t, x, **options).prev_sample)
    assert mine.step_index == peer.step_index == row + 1
    assert distance(results[1], results[0]) < BOUND
