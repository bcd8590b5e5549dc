"""`sample`: batches, seeds, resuming, guidance, what it asks of the model and of the host."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels import normal_noise, schedulers
from vqkernels.schedulers import SamplingState, sample

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [name for name in schedulers.__all__ if name.endswith("Scheduler")]
NOISY = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler")
SHAPE = (4, 3, 5)


def model(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    assert t.shape == x.shape[:1]
    output = x * 0.3 * torch.tanh(x + t.reshape(-1, 1, 1) / 1000)
    return output if y is None else output + y.reshape(-1, 1, 1) / 10


def make(name: str, steps: int = 6) -> Any:
    scheduler = getattr(schedulers, name)()
    scheduler.set_timesteps(4 if name == "LCMScheduler" else steps)
    return scheduler


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_does_not_matter(name: str) -> None:
    labels, none = torch.arange(5.0), torch.full((5,), -1.0)

    def draw(ids: list[int]) -> Tensor:
        return sample(
            model,
            make(name),
            (len(ids), *SHAPE[1:]),
            seed=3,
            sample_ids=torch.tensor(ids),
            conditions={"y": labels[ids]},
            unconditional={"y": none[ids]},
            guidance_scale=2.5,
            guidance_rescale=0.7,
        )

    whole = draw([0, 1, 2, 3])
    assert whole.isfinite().all()
    assert torch.equal(torch.cat([draw([0]), draw([1, 2]), draw([3])]), whole)
    assert not torch.equal(draw([4]), whole[:1])


@pytest.mark.parametrize("name", NAMES)
def test_any_step_can_be_resumed(name: str) -> None:
    stored: list[bytes] = []

    def store(state: SamplingState) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        stored.append(buffer.getvalue())

    scheduler = make(name)
    whole = sample(model, scheduler, SHAPE, seed=3, on_step=store)
    assert len(stored) == len(scheduler.timesteps)
    for raw in stored:
        state = torch.load(io.BytesIO(raw), weights_only=False)
        assert torch.equal(sample(model, make(name), SHAPE, seed=3, state=state), whole)
    assert torch.equal(sample(model, scheduler, SHAPE, seed=3), whole)  # used once more
    assert not torch.equal(sample(model, scheduler, SHAPE, seed=4), whole)


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_scheduler(name: str) -> None:
    scheduler = make(name)
    scheduler.set_begin_index(0)
    x = normal_noise(SHAPE, seed=3) * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t.expand(4))
        options = {"seed": 3} if name in NOISY else {}
        x = scheduler.step(output, t, x, **options).prev_sample
    assert torch.equal(sample(model, make(name), SHAPE, seed=3), x)


class Recorder(TorchDispatchMode):
    """Refuses what waits for a device: values read by the host, and transfers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name, "a value was read by the host"
        assert not name.startswith("aten::is_nonzero"), "a tensor was asked for its truth"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device(name: str) -> None:
    scheduler = make(name)
    scheduler.begin_loop()
    seed = torch.tensor(3)
    x = torch.randn(SHAPE) * float(scheduler.init_noise_sigma)
    with torch.no_grad(), Recorder():
        for row in range(len(scheduler.timesteps)):
            t = scheduler.timesteps[row]
            output = model(scheduler.scale_model_input(x, t), t.expand(4))
            x = scheduler.next_sample(x, output, row, seed=seed)
    assert x.isfinite().all()


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_guidance_interval_saves_calls(name: str) -> None:
    sizes: list[int] = []

    def counted(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return model(x, t, y)

    scheduler = make(name)
    times = scheduler.timesteps.tolist()
    labels: dict[str, Any] = {
        "conditions": {"y": torch.arange(4.0)},
        "unconditional": {"y": torch.zeros(4)},
    }
    interval = (times[3], times[1])
    found = sample(
        counted, scheduler, SHAPE, seed=1, guidance_scale=4, guidance_interval=interval, **labels
    )
    assert sizes == [4, 8, 8, 8, 4, 4]
    plain = sample(model, scheduler, SHAPE, seed=1, guidance_scale=4, **labels)
    assert not torch.equal(found, plain)
    everywhere = (min(times), max(times))
    assert torch.equal(
        plain,
        sample(
            model,
            scheduler,
            SHAPE,
            seed=1,
            guidance_scale=4,
            guidance_interval=everywhere,
            **labels,
        ),
    )


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y,), lambda y: SimpleNamespace(sample=y)])
def test_what_models_return(wrap: Callable[[Tensor], Any]) -> None:
    found = sample(lambda x, t: wrap(model(x, t)), make("DDIMScheduler"), SHAPE, seed=1)
    assert torch.equal(found, sample(model, make("DDIMScheduler"), SHAPE, seed=1))


def test_halves_and_latents() -> None:
    scheduler = make("EulerDiscreteScheduler")
    half = sample(model, scheduler, SHAPE, seed=1, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    latents = normal_noise(SHAPE, seed=1) * float(scheduler.init_noise_sigma)
    given = sample(model, scheduler, SHAPE, seed=1, latents=latents)
    assert torch.equal(given, sample(model, scheduler, SHAPE, seed=1))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sample(model, make("DDIMScheduler"), SHAPE, seed=1, progress=True)
    assert "sampling" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale needs unconditional, got 2.0 and none"),
        ({"conditions": {"y": torch.zeros(3)}}, r"y must be \[4, ...\], got \[3\]"),
        (
            {"conditions": {"y": torch.zeros(4)}, "unconditional": {"z": torch.zeros(4)}},
            "unconditional must have the keys of conditions",
        ),
        ({"sample_ids": torch.arange(3)}, r"sample_ids must be int64 \[4\]"),
        ({"latents": torch.zeros(4, 3)}, r"latents must be \[4, 3, 5\]"),
        (
            {"state": SamplingState(9, torch.zeros(SHAPE), {})},
            "state must have a sample .* and a step of 0 to 6",
        ),
        (
            {"state": SamplingState(2, torch.zeros(SHAPE), {"other": 1})},
            "memory must hold",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps must lie in"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(model, make("DDIMScheduler"), SHAPE, **{"seed": 1, **arguments})


def test_no_timesteps() -> None:
    with pytest.raises(ValueError, match="call set_timesteps"):
        sample(model, schedulers.DDIMScheduler(), SHAPE, seed=1)


def test_numerics_of_diffusers_are_refused() -> None:
    scheduler = schedulers.DDIMScheduler(numerics="diffusers")
    with pytest.raises(ValueError, match="needs numerics='exact'"):
        sample(model, scheduler, SHAPE, seed=1, num_inference_steps=3)
