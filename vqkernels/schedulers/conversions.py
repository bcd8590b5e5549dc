"""Between parameterisations and between time conventions; the names say which is meant.

A noisy sample is x_t = alpha x0 + sigma z, and all that a model needs to know of it is the ratio
sigma / alpha. Each time convention is a class that turns into that pair of weights and back:

| class        | its number                   | alpha, sigma             | used by             |
|--------------|------------------------------|--------------------------|---------------------|
| `DDPMIndex`  | t in [0, T - 1], 0 near data | sqrt(a_t), sqrt(1 - a_t) | DDPM, DDIM          |
| `EDMSigma`   | sigma in [0, inf)            | 1, sigma                 | EDM, k-diffusion    |
| `NoiseTime`  | t in [0, 1], 1 is noise      | 1 - t, t                 | rectified flow, SD3 |
| `DataTime`   | t in [0, 1], 1 is data       | t, 1 - t                 | SiT, flow matching  |

    EDMSigma.at(NoiseTime(torch.tensor([0.5])).level()).sigma        # [1.]

A type checker tells a `NoiseTime` from a `DataTime`. All arithmetic is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice, check_floating

PARAMETERISATIONS = ("epsilon", "sample", "v", "flow", "data_flow")


class Level(NamedTuple):
    """x_t = alpha x0 + sigma z: two float64 tensors of one shape."""

    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class EDMSigma:
    """The noise's standard deviation where the data's weight is 1 (arXiv:2206.00364)."""

    sigma: Tensor

    def level(self) -> Level:
        sigma = _wide("sigma", self.sigma)
        return Level(torch.ones_like(sigma), sigma)

    @classmethod
    def at(cls, level: Level) -> EDMSigma:
        """Infinite where a level has no data."""
        return cls(level.sigma / level.alpha)


@dataclass(frozen=True)
class NoiseTime:
    """The straight path (1 - t) x0 + t z from data at 0 to noise at 1 (arXiv:2209.03003)."""

    t: Tensor

    def level(self) -> Level:
        t = _wide("t", self.t)
        return Level(1 - t, t)

    @classmethod
    def at(cls, level: Level) -> NoiseTime:
        return cls(level.sigma / (level.alpha + level.sigma))


@dataclass(frozen=True)
class DataTime:
    """The straight path t x0 + (1 - t) z from noise at 0 to data at 1 (arXiv:2210.02747)."""

    t: Tensor

    def level(self) -> Level:
        t = _wide("t", self.t)
        return Level(t, 1 - t)

    @classmethod
    def at(cls, level: Level) -> DataTime:
        return cls(level.alpha / (level.alpha + level.sigma))


@dataclass(frozen=True)
class DDPMIndex:
    """A position in a table of T training levels, alpha^2 + sigma^2 = 1 (arXiv:2006.11239).

    Between two entries log(sigma / alpha) is linear in t, as in EDM's and k-diffusion's samplers.

    Args:
        t: positions of any shape, integer or floating point.
        alphas_cumprod: alpha^2 `[T]`, strictly decreasing, in (0, 1) but for a last 0.
    """

    t: Tensor
    alphas_cumprod: Tensor

    def level(self) -> Level:
        """Raises ValueError for a position outside [0, T - 1], where reading it does not wait."""
        logs = _log_ratios(self.alphas_cumprod).to(self.t.device)
        t = self.t.double()
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= len(logs) - 1)).all()):
            raise ValueError(
                f"t must lie in [0, {len(logs) - 1}], got values from {t.min()} to {t.max()}"
            )
        below = t.floor().long().clamp(max=len(logs) - 2)
        part = t - below
        # At an entry itself nothing of its neighbour, which may be infinite.
        log = torch.where(part == 1, logs[below + 1], logs[below])
        between = (part > 0) & (part < 1)
        mixed = logs[below] + part * (logs[below + 1] - logs[below])
        return _variance_preserving(torch.where(between, mixed, log))

    @classmethod
    def at(cls, level: Level, alphas_cumprod: Tensor) -> DDPMIndex:
        """The position, maybe between two entries; levels beyond the table take its ends."""
        logs = _log_ratios(alphas_cumprod).to(level.alpha.device)
        log = level.sigma.log() - level.alpha.log()
        above = torch.searchsorted(logs, log.contiguous()).clamp(1, len(logs) - 1)
        low, high = logs[above - 1], logs[above]
        part = ((log - low) / (high - low)).clamp(0, 1)
        part = torch.where(log == high, 1.0, part)  # both infinite at a zero SNR
        return cls(above - 1 + part, alphas_cumprod)


def rescale(x_t: Tensor, source: Level, target: Level) -> Tensor:
    """The noisy sample of `source` at the scale of `target`, a level of the same sigma / alpha.

    x (alpha' + sigma') / (alpha + sigma), per sample or token: levels are a prefix of x_t's shape.
    A variance-preserving sample becomes EDM's by `rescale(x, level, EDMSigma.at(level).level())`.

    Returns:
        x_t's shape and dtype.

    Raises:
        TypeError: x_t is not a floating-point tensor.
        ValueError: levels that are no prefix of x_t's shape.
    """
    check_floating("x_t", x_t)
    factor = (target.alpha + target.sigma) / (source.alpha + source.sigma)
    return (x_t.double() * _spread("source", factor, x_t)).to(x_t.dtype)


def convert_prediction(
    prediction: Tensor, x_t: Tensor, level: Level, *, source: str, target: str
) -> Tensor:
    """What a model that predicts `source` says of `target`, at x_t = alpha x0 + sigma z.

    | name        | c x0 + d z           | det = alpha d - sigma c |
    |-------------|----------------------|-------------------------|
    | "epsilon"   | z                    | alpha                   |
    | "sample"    | x0                   | -sigma                  |
    | "v"         | alpha z - sigma x0   | alpha^2 + sigma^2       |
    | "flow"      | z - x0               | alpha + sigma           |
    | "data_flow" | x0 - z               | -alpha - sigma          |

    With x_t and a prediction p = c x0 + d z, the target c' x0 + d' z is
    ((c' d - c d') x_t + (alpha d' - sigma c') p) / det. "flow" is the velocity of a path whose time
    grows towards the noise, "data_flow" of one whose time grows towards the data.

    Args:
        prediction, x_t: one shape, floating point.
        level: alpha and sigma, a prefix of x_t's shape.
        source, target: names as above.

    Returns:
        prediction's shape and dtype. Not finite where det is 0: noise says nothing of data where
        alpha is 0, data nothing of noise where sigma is.

    Raises:
        TypeError: prediction or x_t is not a floating-point tensor.
        ValueError: shapes that do not fit, an unknown name.
    """
    check_floating("prediction", prediction)
    check_floating("x_t", x_t)
    check_choice("source", source, PARAMETERISATIONS)
    check_choice("target", target, PARAMETERISATIONS)
    if prediction.shape != x_t.shape:
        raise ValueError(
            f"prediction must have x_t's shape {list(x_t.shape)}, got {list(prediction.shape)}"
        )
    if source == target:
        return prediction
    alpha, sigma = (_spread("level", weight, x_t) for weight in level)
    c, d = _weights(source, alpha, sigma)
    c2, d2 = _weights(target, alpha, sigma)
    mixed = (c2 * d - c * d2) * x_t.double() + (alpha * d2 - sigma * c2) * prediction.double()
    return (mixed / (alpha * d - sigma * c)).to(prediction.dtype)


def _weights(name: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    return {
        "epsilon": (zero, one),
        "sample": (one, zero),
        "v": (-sigma, alpha),
        "flow": (-one, one),
        "data_flow": (one, -one),
    }[name]


def _variance_preserving(log_ratio: Tensor) -> Level:
    # sigmoid keeps both weights' relative precision where the other is nearly 1.
    return Level((-2 * log_ratio).sigmoid().sqrt(), (2 * log_ratio).sigmoid().sqrt())


def _log_ratios(alphas_cumprod: Tensor) -> Tensor:
    """log(sigma / alpha) of every entry, rising."""
    check_floating("alphas_cumprod", alphas_cumprod)
    if alphas_cumprod.dim() != 1 or len(alphas_cumprod) < 2:
        raise ValueError(
            f"alphas_cumprod must be [T] with T >= 2, got shape {list(alphas_cumprod.shape)}"
        )
    squares = alphas_cumprod.double()
    return 0.5 * ((1 - squares).log() - squares.log())


def _spread(name: str, weight: Tensor, x_t: Tensor) -> Tensor:
    if weight.shape != x_t.shape[: weight.dim()]:
        raise ValueError(
            f"{name} must be a prefix of x_t's shape {list(x_t.shape)}, got {list(weight.shape)}"
        )
    return weight.double().reshape(*weight.shape, *(1,) * (x_t.dim() - weight.dim()))


def _wide(name: str, value: Tensor) -> Tensor:
    check_floating(name, value)
    return value.double()
