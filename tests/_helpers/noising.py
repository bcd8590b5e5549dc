"""Calls of the noise ops, on any device, and float64 to judge them by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from _helpers.data import generator
from _helpers.precision import assert_rounded_once
from vqkernels import denoise_coefficients
from vqkernels.reference import denoise_step, diffuse, diffusion_loss, normal_noise

TARGETS = ("epsilon", "sample", "v", "flow")
LOSSES = ("mse", "huber", "pseudo_huber")
SEED, STEP, STREAM = -0x1234567890ABCDE, 2**32 + 7, 9
REFERENCES = {
    "normal_noise": normal_noise.normal_noise,
    "diffuse": diffuse.diffuse,
    "diffusion_loss": diffusion_loss.diffusion_loss,
    "diffusion_loss_backward": diffusion_loss.diffusion_loss_backward,
    "denoise_step": denoise_step.denoise_step,
}
Shape = tuple[int, ...]


def key_on(device: str) -> Tensor:
    return torch.tensor([SEED, STEP, STREAM], device=device)


def run(op: str, backend: str, *arguments: Any) -> Any:
    return getattr(torch.ops.vqkernels, op)(*arguments, backend)


def judge_noising(op: str, backend: str, *arguments: Any) -> Any:
    """Results against the reference in float64, rounded once to their dtypes."""
    found = run(op, backend, *arguments)
    exact = REFERENCES[op](*(_widened(argument) for argument in arguments))
    pairs = [(found, exact)] if isinstance(found, Tensor) else list(zip(found, exact, strict=True))
    for mine, true in pairs:
        assert mine.shape == true.shape
        if mine.numel() > 0:
            assert_rounded_once([mine], [true])
    return found


def _widened(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        # The table of coefficients is float32 whatever the sample is.
        table = argument.dtype == torch.float32 and argument.shape[1:] == (22,)
        return argument.double() if argument.is_floating_point() and not table else argument
    return [_widened(entry) for entry in argument] if isinstance(argument, list) else argument


class Numbers:
    """Random tensors of one device, the same ones for each seed."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device, self._generator = device, generator(seed)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, dtype)

    def positive(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(*shape, generator=self._generator).to(self.device) + 0.1

    def samples_apart(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Every sample contiguous, with a gap behind it."""
        return self.normal((shape[0], 2, *shape[1:]), dtype)[:, 0]

    def ids(self, batch: int) -> Tensor:
        found = torch.arange(batch, device=self.device) * 3 + 2**32 - 4
        return found.flip(0)


def levels_in(shape: Shape) -> Iterator[Shape]:
    for dims in range(1, len(shape) + 1):
        yield shape[:dims]


def noised(numbers: Numbers, shape: Shape, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """(x0, alpha, sigma, noise, key, sample_ids) with every way to give noise, at every level."""
    key = key_on(numbers.device)
    for at in levels_in(shape):
        weights = numbers.normal(at), numbers.normal(at)
        for ids in (None, numbers.ids(shape[0])):
            yield (numbers.normal(shape, dtype), *weights, None, key, ids)
        for x0 in (numbers.normal(shape, dtype), numbers.samples_apart(shape, dtype)):
            yield (x0, *weights, numbers.samples_apart(shape, torch.float16), None, None)


def table_of_steps(numbers: Numbers, rescale: bool = False) -> Tensor:
    """Five rows with every term, two of them with a few only."""
    table = numbers.normal((5, 22))
    table[:, 1] = numbers.positive((5,)) * 0.5 if rescale else 0
    table[:, 4] = numbers.positive((5,)) + 0.5
    table[:, 13], table[:, 14] = -3.0, -1.0
    table[2, [3, 5, 8, 12, 16]] = 0
    table[4] = denoise_coefficients(prev_sample=0.9, prev_output=-0.4)[0]
    return table
