"""Forward noising and the training loss, at latents' and pictures' sizes, against diffusers and
PyTorch.

`diffuse` draws noise and writes x_t and the v target. What its peers draw differs, so it is timed
beside them and checked by what holds of any noise. The loss is forward with backward: ours draws
the noise again, the peers read the noise that they stored. Levels are looked up in the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .bench_modulation import COMPILED, EAGER, FRESH, REUSED, keep_freed_memory
from .case import OURS, Check, Provider, Variant
from .checks import judged
from .shapes import NOISE_SHAPES

DIFFUSERS = "diffusers"
SEED = 0
TRAINING_STEPS = 1000
# Ten rounds of two products, four exclusive ors and a key's two sums for four elements; a
# logarithm, a root, a cosine and a sine for two.
NORMAL_OPERATIONS = 35
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")

Call = Callable[[], list[Tensor]]


def alphas_cumprod() -> Tensor:
    """Of the linear schedule (arXiv:2006.11239), float64."""
    betas = torch.linspace(1e-4, 0.02, TRAINING_STEPS, dtype=torch.float64)
    return (1 - betas).cumprod(0)


def columns(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, as it multiplies samples in plain PyTorch."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def compiled(bind: Callable[[Callable[..., Any], Any], Call], function: Any) -> Provider:
    def variant(mode: str) -> Variant:
        return Variant(
            mode, lambda inputs: bind(torch.compile(function, mode=mode, dynamic=False), inputs)
        )

    return Provider(COMPILED, tuple(variant(mode) for mode in COMPILE_MODES))


@dataclass(frozen=True)
class NoiseRow:
    """Samples of one size; what cases of noise have in common."""

    name: str
    size: tuple[int, ...]
    dtype: str
    memory: str = REUSED
    default: bool = True
    quick: bool = False

    @property
    def shape(self) -> str:
        return f"{'x'.join(map(str, self.size))} {self.dtype}"

    @property
    def mode(self) -> str:
        return self.memory

    @property
    def elements(self) -> int:
        return math.prod(self.size)

    @property
    def bytes_an_operand(self) -> int:
        return self.elements * getattr(torch, self.dtype).itemsize

    def draw(self, count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randn(self.size, generator=generator).to(getattr(torch, self.dtype))
            for _ in range(count)
        ]

    def keyed_noise(self, step: int = 0, stream: int = 0) -> Tensor:
        """The normals of `SEED`, fp32, computed in float64."""
        from vqkernels.reference.normal_noise import normal_noise

        key = torch.tensor([SEED, step, stream])
        return normal_noise(self.size, key, None, torch.float32)

    def keep(self, output: list[Tensor]) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in output]

    def packed_bytes(self, inputs: Any) -> None:
        return None


def not_normal(z: Tensor, dtype: torch.dtype) -> str:
    """Why these are no standard normals, by their first two moments, five deviations off."""
    count, rounding = z.numel(), 2 * torch.finfo(dtype).eps
    mean, variance = float(z.mean()), float(z.var())
    if abs(mean) > 5 / count**0.5 + rounding:
        return f"noise has mean {mean:.3g}"
    if abs(variance - 1) > 5 * (2 / count) ** 0.5 + rounding:
        return f"noise has variance {variance:.4g}"
    return ""


@dataclass(frozen=True)
class Inputs:
    """`levels` is float32 `[T, 2]`: the weights of data and noise at every timestep."""

    x0: Tensor
    t: Tensor
    levels: Tensor
    output: Tensor
    noise: Tensor
    weight: Tensor
    grad: Tensor


def eager_diffuse(x0: Tensor, t: Tensor, levels: Tensor) -> list[Tensor]:
    alpha, sigma = (columns(level, x0) for level in levels[t].unbind(1))
    noise = torch.randn_like(x0)
    return [alpha * x0 + sigma * noise, alpha * noise - sigma * x0]


def eager_loss(
    output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, levels: Tensor, weight: Tensor
) -> Tensor:
    alpha, sigma = (columns(level, x0) for level in levels[t].unbind(1))
    target = alpha * noise - sigma * x0
    wide = torch.promote_types(x0.dtype, torch.float32)  # as training scripts do
    errors = F.mse_loss(output.to(wide), target.to(wide), reduction="none")
    return weight * errors.flatten(1).mean(1)


@dataclass(frozen=True)
class DiffuseCase(NoiseRow):
    op: str = "diffuse"

    @property
    def operations(self) -> float:
        return float(self.elements * (NORMAL_OPERATIONS + 6))

    @property
    def bytes_moved(self) -> float:
        """x0 is read, x_t and the target are written."""
        return 3.0 * self.bytes_an_operand

    def inputs(self, data: str) -> Inputs:
        keep_freed_memory(self.memory == REUSED)
        torch.manual_seed(0)
        kept = alphas_cumprod()
        x0, output = self.draw(2)
        batch = self.size[0]
        # Not the first timesteps: diffusers has no noise left there in bf16.
        t = torch.linspace(50, TRAINING_STEPS - 50, batch).long()
        levels = torch.stack([kept.sqrt(), (1 - kept).sqrt()], 1).float()
        noise = self.keyed_noise()
        weight = torch.linspace(0.5, 2, batch)
        return Inputs(x0, t, levels, output, noise, weight, torch.full((batch,), 1 / batch))

    def providers(self) -> tuple[Provider, ...]:
        return (
            Provider(OURS, (Variant("", self.bind_ours),)),
            Provider(DIFFUSERS, (Variant("", self.bind_diffusers),)),
            Provider(EAGER, (Variant("", lambda inputs: self.bind(eager_diffuse, inputs)),)),
            compiled(self.bind, eager_diffuse),
        )

    def bind(self, function: Callable[..., list[Tensor]], inputs: Inputs) -> Call:
        def call() -> list[Tensor]:
            return function(inputs.x0, inputs.t, inputs.levels)

        call()  # compiles
        return call

    def bind_ours(self, inputs: Inputs) -> Call:
        from vqkernels import diffuse

        x0 = inputs.x0
        out = (torch.empty_like(x0), torch.empty_like(x0)) if self.memory == REUSED else None

        def call() -> list[Tensor]:
            alpha, sigma = inputs.levels[inputs.t].unbind(1)
            return list(diffuse(x0, alpha, sigma, seed=SEED, target="v", out=out))

        call()  # as the others, for their peak of memory
        return call

    def bind_diffusers(self, inputs: Inputs) -> Call:
        from diffusers import DDPMScheduler

        scheduler, x0, t = DDPMScheduler(), inputs.x0, inputs.t

        def call() -> list[Tensor]:
            noise = torch.randn_like(x0)
            return [scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)]

        call()
        return call

    def check(self, inputs: Inputs, outputs: Mapping[str, Any]) -> dict[str, Check]:
        """Ours against its key's noise in float64. Of all: with a^2 + s^2 = 1, a x_t - s v is x0
        and a v + s x_t is the noise."""
        x0 = inputs.x0.double()
        a, s = (columns(level, x0) for level in inputs.levels[inputs.t].unbind(1))
        noise = inputs.noise.double()
        exact = [a * x0 + s * noise, a * noise - s * x0]
        ours = {name: output for name, output in outputs.items() if name == OURS}
        checks = judged(exact, ours, EAGER, 2e-6, self.elements)
        for name, (x_t, v) in outputs.items():
            if name in checks and checks[name].refusal:
                continue
            error = float((a * x_t.double() - s * v.double() - x0).abs().max())
            allowed = 4 * torch.finfo(x_t.dtype).eps * float(x0.abs().max())
            if x_t.dtype == torch.float32:
                allowed *= 8  # diffusers multiplies a thousand rounded factors
            refusal = not_normal(a * v.double() + s * x_t.double(), x_t.dtype)
            if not error <= allowed:
                refusal = f"a x_t - s v is off x0 by {error:.2g}, allowed {allowed:.2g}"
            checks[name] = Check(self.elements, 0, refusal)
        return checks


@dataclass(frozen=True)
class LossCase(DiffuseCase):
    op: str = "diffusion_loss"

    @property
    def operations(self) -> float:
        return float(self.elements * (2 * NORMAL_OPERATIONS + 12))

    @property
    def bytes_moved(self) -> float:
        """Output and x0 are read twice, the gradient is written."""
        return 5.0 * self.bytes_an_operand

    def providers(self) -> tuple[Provider, ...]:
        return (
            Provider(OURS, (Variant("", self.bind_ours),)),
            Provider(EAGER, (Variant("", lambda inputs: self.bind(eager_loss, inputs)),)),
            compiled(self.bind, eager_loss),
        )

    def bind(self, function: Callable[..., Any], inputs: Inputs) -> Call:
        stored = inputs.noise.to(inputs.x0.dtype)

        def losses(output: Tensor) -> Tensor:
            return function(output, inputs.x0, stored, inputs.t, inputs.levels, inputs.weight)

        return self.bind_losses(losses, inputs)

    def bind_ours(self, inputs: Inputs) -> Call:
        from vqkernels import diffusion_loss

        def losses(output: Tensor) -> Tensor:
            alpha, sigma = inputs.levels[inputs.t].unbind(1)
            return diffusion_loss(
                output, inputs.x0, alpha, sigma, seed=SEED, target="v", weight=inputs.weight
            )

        return self.bind_losses(losses, inputs)

    def bind_losses(self, losses: Callable[[Tensor], Tensor], inputs: Inputs) -> Call:
        output = inputs.output.detach().requires_grad_()

        def call() -> list[Tensor]:
            found = losses(output)
            return [found, *torch.autograd.grad(found, [output], inputs.grad)]

        call()  # compiles
        return call

    def check(self, inputs: Inputs, outputs: Mapping[str, Any]) -> dict[str, Check]:
        """At most twice eager's error and an ulp of the largest number; 2e-6 of it in fp32."""
        wide = replace(
            inputs,
            x0=inputs.x0.double(),
            output=inputs.output.double(),
            levels=inputs.levels.double(),
            weight=inputs.weight.double(),
            grad=inputs.grad.double(),
        )
        exact = self.keep(self.bind(eager_loss, wide)())
        return judged(exact, outputs, EAGER, 2e-6, self.elements)


def _cases() -> tuple[DiffuseCase, ...]:
    return tuple(
        case(
            row.name,
            row.shape,
            dtype,
            memory,
            default=memory == REUSED,
            quick=(row.name, dtype, memory) == ("latent-256", "bfloat16", REUSED),
        )
        for case in (DiffuseCase, LossCase)
        for row in NOISE_SHAPES
        for dtype in row.dtypes
        for memory in (REUSED, FRESH)
    )


CASES = _cases()


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.op} {c.name} {c.shape}") for c in CASES if c.default]
)
def test_noise(benchmark: Any, case: DiffuseCase) -> None:
    inputs = case.inputs("gaussian")
    call = case.bind_ours(inputs)
    assert not case.check(inputs, {OURS: case.keep(call())})[OURS].refusal
    benchmark.extra_info["operations"] = case.operations
    benchmark(call)
