"""Steps of samplers and whole loops, against diffusers' schedulers and plain PyTorch.

`scheduler_step` is one call of `step` in the middle of 50, as diffusers' pipelines make it, with
the history filled. `sampling_loop` is 50 of them with `set_timesteps` and a model of one product:
what a sampler costs beside its model. `denoise_step` is the op below them, for its share of the
copy rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from .bench_modulation import EAGER, FRESH, REUSED, keep_freed_memory
from .bench_noise import (
    DIFFUSERS,
    NORMAL_OPERATIONS,
    SEED,
    Call,
    NoiseRow,
    compiled,
    not_normal,
)
from .case import OURS, Check, Provider, Variant
from .checks import judged
from .samplers import DDPM_STD, GUIDANCE, ROW, SAMPLERS, STEPS, Sampler
from .shapes import NOISE_SHAPES

# diffusers' levels are products of a thousand rounded factors, in bf16 rounded once more.
PEER_ERROR = {"float32": 1e-4, "bfloat16": 5e-2}
OUR_ERROR = 2e-6  # of fp32's largest number


def repeated(scheduler: Any, step: Callable[[], Any]) -> Callable[[], Any]:
    """`step` again and again from the state in which the scheduler is now."""

    def state() -> dict[str, Any]:
        return {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
        return a is b

    before = state()
    step()
    # Put back what a step changed, and nothing else: that takes less than a microsecond.
    changed = {k: before.get(k) for k, v in state().items() if not same(v, before.get(k))}
    lists = [k for k, v in changed.items() if isinstance(v, list)]
    values = vars(scheduler)

    def call() -> Any:
        values.update(changed)
        for name in lists:
            values[name] = list(changed[name])
        return step()

    values.update({k: list(v) if k in lists else v for k, v in changed.items()})
    return call


def model_input(scheduler: Any, sample: Tensor, t: Tensor) -> Tensor:
    """The sample as the model gets it; diffusers' flows have no such method."""
    if hasattr(scheduler, "scale_model_input"):
        return scheduler.scale_model_input(sample, t)
    return sample


@dataclass(frozen=True)
class Inputs:
    """Of rows ROW - 2 to ROW, oldest first."""

    samples: list[Tensor]
    outputs: list[Tensor]
    uncond: Tensor


@dataclass(frozen=True)
class StepCase(NoiseRow):
    sampler: str = "DDIM"
    op: str = "scheduler_step"

    @property
    def mode(self) -> str:
        return f"{self.sampler}, {self.memory}"

    @property
    def what(self) -> Sampler:
        return SAMPLERS[self.sampler]

    @property
    def operations(self) -> float:
        """Of the noise; memory bounds the rest by far."""
        return float(self.elements * NORMAL_OPERATIONS if self.what.guided else 0)

    @property
    def bytes_moved(self) -> float:
        return float((self.what.reads + self.what.writes) * self.bytes_an_operand)

    def inputs(self, data: str) -> Inputs:
        keep_freed_memory(self.memory == REUSED)
        torch.manual_seed(0)
        drawn = self.draw(7)
        outputs = drawn[3:6]
        samples = self.what.loop([t.double() for t in drawn[:3]], [t.double() for t in outputs])
        return Inputs([t.to(drawn[0].dtype) for t in samples], outputs, drawn[6])

    def providers(self) -> tuple[Provider, ...]:
        return (
            Provider(OURS, (Variant("", self.bind_ours),)),
            Provider(DIFFUSERS, (Variant("", self.bind_diffusers),)),
            compiled(self.bind, self.plain),
        )

    def plain(self, sample: Tensor, output: Tensor, *rest: Tensor) -> Tensor:
        if self.what.guided:
            return self.what.plain(sample, output, *rest, torch.randn_like(sample))
        return self.what.plain(sample, output, *rest)

    def bind(self, function: Callable[..., Tensor], inputs: Inputs) -> Call:
        history = self.what.history(inputs.samples, inputs.outputs)
        rest = (inputs.uncond,) if self.what.guided else history
        sample, output = inputs.samples[-1], inputs.outputs[-1]

        def call() -> list[Tensor]:
            return [function(sample, output, *rest)]

        call()  # compiles
        return call

    def scheduler(self, library: Any) -> Any:
        """Of a library, two steps before `ROW`."""
        scheduler = getattr(library, self.what.scheduler)(**self.what.config)
        scheduler.set_timesteps(STEPS)
        if self.what.scheduler not in ("DDIMScheduler", "DDPMScheduler"):
            scheduler.set_begin_index(ROW - 2)
        return scheduler

    def bind_scheduler(self, scheduler: Any, inputs: Inputs, step: Callable[..., Any]) -> Call:
        def advance(i: int) -> Any:
            t = scheduler.timesteps[ROW - 2 + i]
            model_input(scheduler, inputs.samples[i], t)
            return step(inputs.outputs[i], t, inputs.samples[i])

        for i in range(2):
            advance(i)
        t = scheduler.timesteps[ROW]
        model_input(scheduler, inputs.samples[2], t)
        sample, output = inputs.samples[2], inputs.outputs[2]
        call = repeated(scheduler, lambda: step(output, t, sample))
        return lambda: [call()[0]]

    def bind_ours(self, inputs: Inputs) -> Call:
        from vqkernels import schedulers

        scheduler = self.scheduler(schedulers)
        options: dict[str, Any] = {"return_dict": False}
        if self.what.guided:
            options |= {"seed": SEED, "uncond_output": inputs.uncond, "guidance_scale": GUIDANCE}

        def step(output: Tensor, t: Tensor, sample: Tensor) -> Any:
            return scheduler.step(output, t, sample, **options)

        return self.bind_scheduler(scheduler, inputs, step)

    def bind_diffusers(self, inputs: Inputs) -> Call:
        import diffusers

        scheduler, uncond = self.scheduler(diffusers), inputs.uncond

        def step(output: Tensor, t: Tensor, sample: Tensor) -> Any:
            return scheduler.step(output, t, sample, return_dict=False)

        def guided(output: Tensor, t: Tensor, sample: Tensor) -> Any:
            return step(uncond + GUIDANCE * (output - uncond), t, sample)

        return self.bind_scheduler(scheduler, inputs, guided if self.what.guided else step)

    def check(self, inputs: Inputs, outputs: Mapping[str, Any]) -> dict[str, Check]:
        """Against the equations in float64. What drew noise of its own differs by that noise."""
        wide = Inputs(
            [t.double() for t in inputs.samples],
            [t.double() for t in inputs.outputs],
            inputs.uncond.double(),
        )
        plain = self.what.plain
        if not self.what.guided:
            return against(self.bind(plain, wide)(), outputs, self.dtype, self.elements)
        from vqkernels.schedulers._noise import STEP_STREAM

        noise = self.keyed_noise(ROW, STEP_STREAM).double()
        guided = (wide.samples[-1], wide.outputs[-1], wide.uncond)
        exact, mean = (plain(*guided, z) for z in (noise, torch.zeros_like(noise)))
        ours = {name: output for name, output in outputs.items() if name == OURS}
        checks = against([exact], ours, self.dtype, self.elements)
        for name, (previous,) in outputs.items():
            if name != OURS:
                drawn = (previous.double() - mean) / DDPM_STD
                refusal = not_normal(drawn, previous.dtype)
                checks[name] = Check(self.elements, 0, refusal)
        return checks


def against(
    exact: list[Tensor], outputs: Mapping[str, Any], dtype: str, rows: int
) -> dict[str, Check]:
    """Ours: 2e-6 of fp32's largest number; in bf16 at most twice diffusers' error and an ulp of it.
    The others: as far off as diffusers' rounded levels may be."""
    checks: dict[str, Check] = {}
    for name, output in outputs.items():
        refusal = ""
        for found, wanted in zip(output, exact, strict=True):
            error, largest = float((found.double() - wanted).abs().max()), float(wanted.abs().max())
            if not error <= PEER_ERROR[dtype] * largest:
                refusal = f"off by {error:.2g} of {largest:.2g}"
        checks[name] = Check(rows, 0, refusal)
    measures = {OURS}
    if dtype != "float32" and DIFFUSERS in checks and not checks[DIFFUSERS].refusal:
        measures.add(DIFFUSERS)
    judges = {name: output for name, output in outputs.items() if name in measures}
    if OURS in judges:
        checks[OURS] = judged(exact, judges, DIFFUSERS, OUR_ERROR, rows)[OURS]
    return checks


@dataclass(frozen=True)
class LoopCase(StepCase):
    op: str = "sampling_loop"

    @property
    def bytes_moved(self) -> float:
        """The model reads and writes a tensor."""
        return STEPS * (super().bytes_moved + 2.0 * self.bytes_an_operand)

    def providers(self) -> tuple[Provider, ...]:
        return (
            Provider(OURS, (Variant("", lambda inputs: self.bind_loop("vqkernels", inputs)),)),
            Provider(DIFFUSERS, (Variant("", lambda inputs: self.bind_loop(DIFFUSERS, inputs)),)),
        )

    def bind_loop(self, library: str, inputs: Inputs) -> Call:
        import diffusers

        from vqkernels import schedulers

        libraries = {"vqkernels": schedulers, DIFFUSERS: diffusers}
        make = getattr(libraries[library], self.what.scheduler)
        scheduler = make(**self.what.config)

        def call() -> list[Tensor]:
            sample = inputs.samples[-1]
            scheduler.set_timesteps(STEPS)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            for t in scheduler.timesteps:
                output = model_input(scheduler, sample, t) * 0.1
                sample = scheduler.step(output, t, sample, return_dict=False)[0]
            return [sample]

        call()
        return call

    def check(self, inputs: Inputs, outputs: Mapping[str, Any]) -> dict[str, Check]:
        """Both against our loop in float64: diffusers' rounds to fp32 in places."""
        wide = Inputs([t.double() for t in inputs.samples], [], inputs.uncond)
        return against(self.bind_loop("vqkernels", wide)(), outputs, self.dtype, self.elements)


@dataclass(frozen=True)
class OpCase(StepCase):
    """`denoise_step` itself, whose result may be written where the last one lay."""

    op: str = "denoise_step"

    @property
    def bytes_moved(self) -> float:
        return 3.0 * self.bytes_an_operand

    def providers(self) -> tuple[Provider, ...]:
        return (
            Provider(OURS, (Variant("", self.bind_ours),)),
            Provider(EAGER, (Variant("", lambda inputs: self.bind(self.plain, inputs)),)),
            compiled(self.bind, self.plain),
        )

    def bind_ours(self, inputs: Inputs) -> Call:
        from vqkernels import denoise_step, schedulers

        table, row = self.scheduler(schedulers).coefficients, torch.tensor(ROW)
        sample, output = inputs.samples[-1], inputs.outputs[-1]
        out = torch.empty_like(sample) if self.memory == REUSED else None

        def call() -> list[Tensor]:
            return [denoise_step(sample, output, table, index=row, out=out).prev_sample]

        call()  # as the others, for their peak of memory
        return call


def _cases() -> tuple[StepCase, ...]:
    found: list[StepCase] = []
    for row in NOISE_SHAPES:
        for dtype in row.dtypes:
            for memory in (REUSED, FRESH):
                first = (row.name, dtype, memory) == ("latent-256", "float32", REUSED)
                common = (row.name, row.shape, dtype, memory)
                shown = row.name == "latent-256" or (row.name, dtype) == ("pixels-256", "float32")
                for sampler in SAMPLERS:
                    default, quick = shown and memory == REUSED, first and sampler == "DDIM"
                    found.append(StepCase(*common, default, quick, sampler))
                for sampler in ("DDIM", "flow Euler"):
                    quick = first and sampler == "DDIM"
                    found.append(OpCase(*common, memory == REUSED, quick, sampler))
    latents = NOISE_SHAPES[0]
    for sampler in SAMPLERS:
        if not SAMPLERS[sampler].guided:
            common = (latents.name, latents.shape, "float32", REUSED)
            found.append(LoopCase(*common, True, sampler == "DDIM", sampler))
    return tuple(found)


CASES = _cases()


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.op} {c.name} {c.shape} {c.mode}") for c in CASES if c.default]
)
def test_scheduler_step(benchmark: Any, case: StepCase) -> None:
    inputs = case.inputs("gaussian")
    call = case.providers()[0].variants[0].bind(inputs)
    assert not case.check(inputs, {OURS: case.keep(call())})[OURS].refusal
    benchmark(call)
