"""Noise levels for sampling, highest first, and the timesteps that belong to them.

A variance-preserving diffusion at step t, x_t = sqrt(a) x0 + sqrt(1 - a) z with
a = alphas_cumprod[t], is x0 + sigma z up to a factor, sigma = sqrt((1 - a) / a):
arXiv:2206.00364, section 3. A rectified flow's sigma is its time, x = (1 - sigma) x0 + sigma z.

The functions keep the precision of what they are given: float64 for exact tables, diffusers'
float32 where its rounding is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Levels = NDArray[Any]
Ramp = TypeVar("Ramp", NDArray[Any], Tensor)

RESPACINGS = ("karras", "exponential", "beta")


def variance_exploding_sigmas(alphas_cumprod: Tensor) -> Levels:
    """sqrt((1 - a) / a), one a training timestep, `[T]`; lowest first."""
    levels: Levels = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy()
    return levels


def karras_sigmas(ramp: Ramp, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Ramp:
    """From sigma_max to sigma_min, linear in sigma^(1 / rho): arXiv:2206.00364, equation 5.

    `ramp` runs from 0 to 1.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def exponential_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Levels:
    """From sigma_max to sigma_min, linear in log(sigma)."""
    if not (sigma_min > 0 and sigma_max > 0):
        raise ValueError(
            f"use_exponential_sigmas needs positive levels, got {sigma_min} to {sigma_max}"
        )
    levels: Levels = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))
    return levels


def beta_sigmas(
    steps: int, sigma_min: float, sigma_max: float, alpha: float = 0.6, beta: float = 0.6
) -> Levels:
    """From sigma_max to sigma_min at the quantiles of a beta distribution: arXiv:2407.12173."""
    share = _beta_distribution().ppf(1 - np.linspace(0, 1, steps), alpha, beta)
    levels: Levels = sigma_min + share * (sigma_max - sigma_min)
    return levels


def _beta_distribution() -> Any:
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise ImportError(
            f"use_beta_sigmas needs scipy, which could not be imported ({error}); install it with "
            "`pip install scipy`"
        ) from error
    return beta


def respacing_of(config: Mapping[str, Any]) -> str | None:
    """Which of `RESPACINGS` a config asks for with its `use_..._sigmas`, or None.

    Raises:
        ImportError: beta is asked for, without scipy.
        ValueError: more than one is asked for.
    """
    chosen = [name for name in RESPACINGS if config.get(f"use_{name}_sigmas")]
    if len(chosen) > 1:
        given = " and ".join(f"use_{name}_sigmas" for name in chosen)
        raise ValueError(
            "only one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas may be "
            f"true, got {given}"
        )
    if "beta" in chosen:
        _beta_distribution()
    return chosen[0] if chosen else None


def respaced_sigmas(name: str, steps: int, sigma_min: float, sigma_max: float) -> Levels:
    """`steps` levels from sigma_max to sigma_min, spaced as one of `RESPACINGS`."""
    if name == "karras":
        return karras_sigmas(np.linspace(0, 1, steps), sigma_min, sigma_max)
    if name == "exponential":
        return exponential_sigmas(steps, sigma_min, sigma_max)
    return beta_sigmas(steps, sigma_min, sigma_max)


def respaced_like(config: Mapping[str, Any], name: str, levels: Levels, steps: int) -> Levels:
    """`respaced_sigmas` between the config's sigma_min and sigma_max, or else those of `levels`."""
    low, high = config.get("sigma_min"), config.get("sigma_max")
    return respaced_sigmas(
        name,
        steps,
        levels[-1].item() if low is None else low,
        levels[0].item() if high is None else high,
    )


def sigma_to_t(sigmas: Levels, log_sigmas: Levels) -> Levels:
    """Timesteps of levels `[S]`, linear in log(sigma) between the training timesteps' `[T]`.

    A level outside of them gets the nearest end. Not a binary search: a schedule that was rescaled
    to zero terminal SNR may fall at its last step, where diffusers puts 2^-24 for alphas_cumprod.
    """
    log_sigma = np.log(np.maximum(sigmas, 1e-10))
    reached = log_sigmas <= log_sigma[:, None]  # [S, T]
    below = np.where(reached, np.arange(len(log_sigmas)), 0).max(axis=1)
    below = below.clip(max=len(log_sigmas) - 2)
    low, high = log_sigmas[below], log_sigmas[below + 1]
    weight = np.clip((low - log_sigma) / (low - high), 0, 1)
    times: Levels = (1 - weight) * below + weight * (below + 1)
    return times


def shift_sigmas(sigmas: Ramp, shift: float) -> Ramp:
    """Times of a flow moved towards noise: s t / (1 + (s - 1) t), arXiv:2403.03206, equation 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def time_shift(kind: str, mu: float, sigmas: Ramp, power: float = 1.0) -> Ramp:
    """A shift that follows the resolution: by exp(mu) ("exponential") or by mu ("linear")."""
    shift = math.exp(mu) if kind == "exponential" else mu
    return shift / (shift + (1 / sigmas - 1) ** power)


def stretch_to_terminal(sigmas: Ramp, terminal: float) -> Ramp:
    """Times of a flow stretched about 1, so that the last one is `terminal`."""
    rest = 1 - sigmas
    return 1 - rest / (rest[-1] / (1 - terminal))


def given_levels(name: str, values: Any, dtype: Any = np.float64) -> Levels:
    """Sigmas or timesteps that a caller gives, `[S]`, highest first.

    Raises:
        ValueError: not one row of numbers, an empty one, NaN or infinite, negative, or ascending.
    """
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    levels: Levels = np.array(values, dtype=np.float64)
    if levels.ndim != 1 or not len(levels):
        raise ValueError(f"{name} must be one row of numbers, got shape {list(levels.shape)}")
    if not np.isfinite(levels).all():
        raise ValueError(f"{name} must be finite, got {levels.tolist()}")
    if (levels < 0).any():
        raise ValueError(f"{name} must not be negative, got {levels.min()}")
    if (np.diff(levels) > 0).any():
        raise ValueError(f"{name} must descend, got {levels.tolist()}")
    return levels.astype(dtype)
