"""The steps of samplers as plain PyTorch, from the papers' equations: what `torch.compile` gets,
and, on float64 tensors, what steps are checked against.

All steps are those of row `ROW` of `STEPS`, with its history filled by the two rows before it.
Levels are float64 numbers of Python. Sources: DDPM arXiv:2006.11239, DDIM arXiv:2010.02502,
Euler arXiv:2206.00364, flows arXiv:2209.03003, DPM-Solver++ arXiv:2211.01095, UniPC
arXiv:2302.04867.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .bench_noise import TRAINING_STEPS, alphas_cumprod

STEPS, ROW = 50, 25
GUIDANCE = 4.0

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Level:
    """The weights of data and noise."""

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma where data are not scaled down."""
        return self.sigma / self.alpha

    @property
    def half_log_snr(self) -> float:
        return math.log(self.alpha / self.sigma)

    def data(self, sample: Tensor, noise: Tensor) -> Tensor:
        return (sample - self.sigma * noise) / self.alpha


def trained_level(row: int) -> Level:
    """Of the linear schedule under "trailing" spacing."""
    kept = alphas_cumprod()[TRAINING_STEPS - 1 - row * TRAINING_STEPS // STEPS].item()
    return Level(kept**0.5, (1 - kept) ** 0.5)


def flow_level(row: int) -> Level:
    sigma = 1 - row * (1 - 1 / TRAINING_STEPS) / (STEPS - 1)
    return Level(1 - sigma, sigma)


NOW, NEXT = trained_level(ROW), trained_level(ROW + 1)
KEPT = NOW.alpha**2 / NEXT.alpha**2  # of the signal's power, by one step of the forward process
DDPM_STD = ((1 - NEXT.alpha**2) / (1 - NOW.alpha**2) * (1 - KEPT)) ** 0.5


def ddim(sample: Tensor, output: Tensor) -> Tensor:
    return NEXT.alpha * NOW.data(sample, output) + NEXT.sigma * output


def euler(sample: Tensor, output: Tensor) -> Tensor:
    return sample + (NEXT.ratio - NOW.ratio) * output


def flow(sample: Tensor, output: Tensor) -> Tensor:
    return sample + (flow_level(ROW + 1).sigma - flow_level(ROW).sigma) * output


def guided_ddpm(sample: Tensor, output: Tensor, uncond: Tensor, noise: Tensor) -> Tensor:
    data = NOW.data(sample, uncond + GUIDANCE * (output - uncond))
    power = 1 - NOW.alpha**2
    of_data = NEXT.alpha * (1 - KEPT) / power
    of_sample = KEPT**0.5 * (1 - NEXT.alpha**2) / power
    return of_data * data + of_sample * sample + DDPM_STD * noise


def exponential(start: Level, end: Level, sample: Tensor, data: Tensor) -> Tensor:
    """A first-order step in half log-SNR, and where higher orders start."""
    h = end.half_log_snr - start.half_log_snr
    return end.sigma / start.sigma * sample - end.alpha * math.expm1(-h) * data


def dpm_history(samples: Tensors, outputs: Tensors) -> tuple[Tensor, ...]:
    """The data as predicted one row earlier."""
    return (trained_level(ROW - 1).data(samples[1], outputs[1]),)


def dpm(sample: Tensor, output: Tensor, before: Tensor) -> Tensor:
    """DPM-Solver++ 2M, midpoint."""
    data, last = NOW.data(sample, output), trained_level(ROW - 1)
    h = NEXT.half_log_snr - NOW.half_log_snr
    r = (NOW.half_log_snr - last.half_log_snr) / h
    bend = 0.5 * NEXT.alpha * math.expm1(-h) * (data - before) / r
    return exponential(NOW, NEXT, sample, data) - bend


def unipc_weights(start: Level, end: Level, older: Level | None) -> tuple[float, float, float]:
    """B(h), and the corrector's weights of the older difference and of the newest ("bh2")."""
    h = end.half_log_snr - start.half_log_snr
    b = math.expm1(-h)
    first = (b / -h - 1) / b
    if older is None:
        return b, 0.0, 0.5
    second = ((b / -h - 1) / -h - 0.5) * 2 / b
    r = (older.half_log_snr - start.half_log_snr) / h
    of_older = (first - second) / (1 - r)
    return b, of_older, first - of_older


def unipc_corrected(
    row: int, before: Tensor, data: Tensor, last: Tensor, older: Tensor | None
) -> Tensor:
    """UniC: the sample at `row` again from the one `before`, once the data there are predicted."""
    start, end = trained_level(row - 1), trained_level(row)
    at = None if older is None else trained_level(row - 2)
    b, of_older, of_new = unipc_weights(start, end, at)
    change = of_new * (data - last)
    if older is not None and at is not None:
        h = end.half_log_snr - start.half_log_snr
        r = (at.half_log_snr - start.half_log_snr) / h
        change = change + of_older * (older - last) / r
    return exponential(start, end, before, last) - end.alpha * b * change


def unipc_predicted(row: int, sample: Tensor, data: Tensor, last: Tensor | None) -> Tensor:
    """UniP: the sample at the next row from a corrected one."""
    start, end = trained_level(row), trained_level(row + 1)
    moved = exponential(start, end, sample, data)
    if last is None:
        return moved
    h = end.half_log_snr - start.half_log_snr
    r = (trained_level(row - 1).half_log_snr - start.half_log_snr) / h
    return moved - 0.5 * end.alpha * math.expm1(-h) * (last - data) / r


def unipc_history(samples: Tensors, outputs: Tensors) -> tuple[Tensor, ...]:
    """The corrected sample one row earlier, and the data predicted one and two rows earlier."""
    older = trained_level(ROW - 2).data(samples[0], outputs[0])
    last = trained_level(ROW - 1).data(samples[1], outputs[1])
    return unipc_corrected(ROW - 1, samples[0], last, older, None), last, older


def unipc_loop(samples: Tensors, outputs: Tensors) -> list[Tensor]:
    """The samples as a loop has them that starts at the first: UniC corrects its own prediction."""
    older = trained_level(ROW - 2).data(samples[0], outputs[0])
    second = unipc_predicted(ROW - 2, samples[0], older, None)
    before, last, older = unipc_history([samples[0], second], outputs)
    return [samples[0], second, unipc_predicted(ROW - 1, before, last, older)]


def unipc(sample: Tensor, output: Tensor, before: Tensor, last: Tensor, older: Tensor) -> Tensor:
    """UniC of order 2, then UniP of order 2."""
    data = NOW.data(sample, output)
    return unipc_predicted(ROW, unipc_corrected(ROW, before, data, last, older), data, last)


def nothing(samples: Tensors, outputs: Tensors) -> tuple[Tensor, ...]:
    return ()


def any_samples(samples: Tensors, outputs: Tensors) -> list[Tensor]:
    return list(samples)


TRAILING = {"timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Sampler:
    """A scheduler of both libraries, and its plain step `(sample, output, *history) -> Tensor`.

    `reads` and `writes` count the tensors that a step's equations need and give; `loop` makes the
    samples of three rows follow each other, where a step takes that for granted.
    """

    scheduler: str
    plain: Callable[..., Tensor]
    reads: int
    writes: int
    config: dict[str, Any] = field(default_factory=lambda: TRAILING)
    history: Callable[[Tensors, Tensors], tuple[Tensor, ...]] = nothing
    loop: Callable[[Tensors, Tensors], list[Tensor]] = any_samples
    guided: bool = False


SAMPLERS = {
    # The predicted data are written too.
    "DDIM": Sampler("DDIMScheduler", ddim, 2, 2, {**TRAILING, "clip_sample": False}),
    "Euler": Sampler("EulerDiscreteScheduler", euler, 2, 2),
    "flow Euler": Sampler("FlowMatchEulerDiscreteScheduler", flow, 2, 1, {}),
    "guided DDPM": Sampler(
        "DDPMScheduler", guided_ddpm, 3, 2, {**TRAILING, "clip_sample": False}, guided=True
    ),
    "DPM++ 2M": Sampler("DPMSolverMultistepScheduler", dpm, 3, 2, history=dpm_history),
    "UniPC": Sampler(
        "UniPCMultistepScheduler", unipc, 4, 2, history=unipc_history, loop=unipc_loop
    ),
}
