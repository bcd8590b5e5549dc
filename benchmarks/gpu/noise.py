"""The noise ops on a GPU: a latent batch, a batch of images, a video.

Ours run as a loop of training or sampling does: seed, step and table lie on the device. Eager draws
its noise by `torch.randn_like`; what it draws is judged by its moments, the rest against float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels
from benchmarks.case import OURS, Check, Provider, Variant
from benchmarks.checks import judged
from vqkernels.backends import select
from vqkernels.ops.denoise_step import denoise_coefficients

from .device import Device
from .timing import COLD, WARM

NOISE = "bench-noise"
EAGER, COMPILED = "eager", "torch.compile"
DRAW, DIFFUSE, LOSS = "normal_noise", "diffuse", "diffusion_loss, forward+backward"
STEP, GUIDED = "denoise_step, DDIM", "denoise_step, guided, with noise"
# Those whose time is that of their bytes.
NOISE_OPS = (DIFFUSE, STEP, GUIDED)
# Alpha and sigma of one level, and the coefficients of one step.
_ALPHA, _SIGMA, _GUIDANCE = 0.8, 0.6, 4.5
_FROM_SAMPLE, _FROM_OUTPUT, _CLIP = 1.25, -0.75, 1.0
_OF_SAMPLE, _OF_PREDICTION, _OF_NOISE = 0.7, 0.25, 0.3


@dataclass(frozen=True)
class Inputs:
    """Of the data's shape: data, a model's output with and without a condition, a given noise."""

    x: Tensor
    output: Tensor
    uncond: Tensor
    noise: Tensor
    alpha: Tensor
    sigma: Tensor
    table: Tensor
    key: Tensor
    index: Tensor

    def widened(self) -> Inputs:
        return dataclasses.replace(
            self, x=self.x.double(), output=self.output.double(), uncond=self.uncond.double()
        )


def _loss_and_gradient(loss: Tensor, output: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [output])]


def _ours(op: str, i: Inputs, backend: str) -> list[Tensor]:
    ops, drawn = torch.ops.vqkernels, (None, i.key, None)
    if op == DRAW:
        return [ops.normal_noise(i.x.shape, i.key, None, i.x.dtype, backend)]
    if op == DIFFUSE:
        return list(ops.diffuse(i.x, i.alpha, i.sigma, *drawn, "v", backend))
    if op == LOSS:
        output = i.output.detach().requires_grad_()
        rest = (*drawn, None, None, "v", "mse", backend)
        return _loss_and_gradient(ops.diffusion_loss(output, i.x, i.alpha, i.sigma, *rest), output)
    guided = op == GUIDED
    tensors = (i.x, i.output, i.table, i.index, i.uncond if guided else None, [], None)
    given = drawn if guided else (None, None, None)
    rest = ("clip" if guided else "none", 0.995, "learned_range", False, False, backend)
    return [ops.denoise_step(*tensors, *given, *rest)[0]]


def _eager(op: str, i: Inputs) -> list[Tensor]:
    if op == DRAW:
        return [torch.randn_like(i.x)]
    if op in (STEP, GUIDED):
        output = i.uncond + _GUIDANCE * (i.output - i.uncond) if op == GUIDED else i.output
        x = _FROM_SAMPLE * i.x + _FROM_OUTPUT * output
        if op == STEP:
            return [_OF_SAMPLE * i.x + _OF_PREDICTION * x]
        prev = _OF_SAMPLE * i.x + _OF_PREDICTION * x.clamp(-_CLIP, _CLIP)
        return [prev + _OF_NOISE * torch.randn_like(i.x)]
    inner = (-1,) + (1,) * (i.x.dim() - 1)
    a, s = (level.view(inner).to(i.x.dtype) for level in (i.alpha, i.sigma))
    if op == DIFFUSE:
        z = torch.randn_like(i.x)
        return [a * i.x + s * z, a * z - s * i.x]
    output = i.output.detach().requires_grad_()
    target = a * i.noise - s * i.x
    loss = F.mse_loss(output.float(), target.float(), reduction="none").flatten(1).mean(1)
    return _loss_and_gradient(loss, output)


@dataclass(frozen=True)
class NoiseCase:
    op: str
    name: str
    sizes: tuple[int, ...]
    dtype: str = "bfloat16"
    stage: str = NOISE
    data: str = "gaussian"
    modes: tuple[str, ...] = (COLD, WARM)

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.sizes))

    @property
    def dtypes(self) -> str:
        return self.dtype

    @property
    def key(self) -> str:
        return f"{self.op} {self.name} {self.shape} {self.dtype}"

    @property
    def operations(self) -> float:
        """Nothing of it should take the time of its bytes."""
        return 0.0

    @property
    def scores(self) -> float:
        return 0.0

    @property
    def bytes_moved(self) -> float:
        """Data, outputs and results once each; the noise is never stored. The loss reads data and
        output in either direction and writes a gradient."""
        tensors = {DRAW: 1, DIFFUSE: 3, LOSS: 5, STEP: 3, GUIDED: 4}[self.op]
        return float(tensors * math.prod(self.sizes) * getattr(torch, self.dtype).itemsize)

    def inputs(self, device: Device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        dtype, batch = getattr(torch, self.dtype), self.sizes[0]

        def draw() -> Tensor:
            return torch.randn(self.sizes, generator=generator).to(device.kind, dtype)

        table = denoise_coefficients(
            guidance=_GUIDANCE if self.op == GUIDED else 1.0,
            prediction_sample=_FROM_SAMPLE,
            prediction_output=_FROM_OUTPUT,
            clip=_CLIP,
            prev_sample=_OF_SAMPLE,
            prev_prediction=[_OF_PREDICTION] * 3,
            prev_noise=_OF_NOISE if self.op == GUIDED else 0.0,
        )
        levels = [torch.full((batch,), level, device=device.kind) for level in (_ALPHA, _SIGMA)]
        key = torch.tensor([3, 0, 0], device=device.kind)
        index = torch.ones((), dtype=torch.int64, device=device.kind)
        return Inputs(draw(), draw(), draw(), draw(), *levels, table.to(device.kind), key, index)

    def providers(self, device: Device) -> tuple[Provider, ...]:
        names = ("cpu", "reference") if device.dry else ("cuda", "triton")
        mine = tuple(
            Provider(f"{OURS}-{name}", (self._variant(_ours, name),))
            for name in names
            if self._serves(name, device)
        )
        eager = Provider(EAGER, (self._variant(_eager),))
        compiled = Provider(COMPILED, (self._variant(torch.compile(_eager)),))
        return (*mine, eager) if self.op == DRAW else (*mine, eager, compiled)

    def _variant(self, function: Callable[..., list[Tensor]], *more: str) -> Variant:
        return Variant("", lambda inputs: lambda: function(self.op, inputs, *more))

    def _serves(self, backend: str, device: Device) -> bool:
        x = torch.empty(1, dtype=getattr(torch, self.dtype), device=device.kind)
        try:
            with vqkernels.use_backend(backend):
                select(self.op.partition(",")[0], x)
        except ValueError:
            return False
        return True

    def keep(self, output: list[Tensor]) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in output]

    def check(self, inputs: Inputs, outputs: Mapping[str, Any], device: Device) -> dict[str, Check]:
        """Ours against the reference in float64, as are peers that draw nothing; of a peer's noise
        the mean and the deviation, to six standard errors."""
        mine = {name: output for name, output in outputs.items() if name.startswith(OURS)}
        exact = [t.double() for t in _ours(self.op, inputs.widened(), "reference")]
        rows = math.prod(self.sizes)
        checks = judged(exact, mine, "", 4e-6, rows)
        for name in outputs.keys() - mine.keys():
            if self.op in (STEP, LOSS):
                theirs = inputs.widened()
                if self.op == LOSS:
                    theirs = dataclasses.replace(theirs, noise=theirs.noise.double())
                exact = [t.double() for t in _eager(self.op, theirs)]
                checks |= judged(exact, {name: outputs[name]}, name, 4e-6, rows)
            else:
                checks[name] = self._judged_noise(inputs, outputs[name])
        return checks

    def _judged_noise(self, inputs: Inputs, output: list[Tensor]) -> Check:
        z = output[0].double()
        if self.op == DIFFUSE:
            # alpha^2 + sigma^2 = 1
            z = _SIGMA * z + _ALPHA * output[1].double()
        elif self.op == GUIDED:
            wide = inputs.widened()
            without = dataclasses.replace(wide, key=None)
            arguments = (without.x, without.output, wide.table, wide.index, without.uncond, [])
            rest = (*(None,) * 4, "clip", 0.995, "learned_range", False, False, "reference")
            z = (z - torch.ops.vqkernels.denoise_step(*arguments, *rest)[0]) / _OF_NOISE
        off = max(abs(float(z.mean())), abs(float(z.std()) - 1))
        allowed = 6 / math.sqrt(z.numel()) + 0.01
        return Check(z.numel(), 0, f"noise is off by {off:.2g}" if off > allowed else "")

    def shrunk(self) -> NoiseCase:
        """Different rows stay different by their names."""
        return dataclasses.replace(self, sizes=(2, 64, *(4,) * (len(self.sizes) - 2)))


def _cases() -> tuple[NoiseCase, ...]:
    """Real batches, much of which fits into an L2, and one that does not."""
    shapes = (
        ("pixels-256", (16, 3, 256, 256)),
        ("latent-512", (32, 4, 64, 64)),
        ("video", (1, 16, 21, 60, 104)),
    )
    ops = (*NOISE_OPS, LOSS, DRAW)
    large = [NoiseCase(op, "pixels-256, large", (256, 3, 256, 256)) for op in NOISE_OPS]
    return (*large, *(NoiseCase(op, name, sizes) for name, sizes in shapes for op in ops))


CASES = _cases()
