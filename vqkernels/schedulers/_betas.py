"""Noise schedules beta_0 .. beta_{T-1} of a discrete diffusion.

    alphas_cumprod[t] = prod_{s <= t} (1 - beta_s),   x_t = sqrt(alphas_cumprod[t]) x_0
                                                            + sqrt(1 - alphas_cumprod[t]) noise

Every function computes in the dtype asked for: float64 for coefficients, float32 with the
roundings that diffusers has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")
_MAX_BETA = 0.999


def make_betas(
    schedule: str,
    steps: int,
    start: float,
    end: float,
    *,
    trained: np.ndarray | Sequence[float] | Tensor | None = None,
    zero_snr: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`[steps]` betas.

    | schedule            | beta_t or alphas_cumprod                       | source           |
    |---------------------|------------------------------------------------|------------------|
    | "linear"            | from start to end                              | arXiv:2006.11239 |
    | "scaled_linear"     | square of a line from sqrt(start) to sqrt(end) | arXiv:2112.10752 |
    | "squaredcos_cap_v2" | alphas_cumprod ~ cos^2, betas at most 0.999    | arXiv:2102.09672 |
    | "sigmoid"           | start + (end - start) sigmoid(-6 .. 6)         | arXiv:2203.02923 |
    | "exp"               | alphas_cumprod ~ exp(-12 time)                 | none             |
    | "laplace"           | log signal-to-noise ratios follow Laplace's    | arXiv:2407.03297 |
    |                     | distribution                                   |                  |
    """
    if steps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, got {steps}")
    if trained is not None:
        betas = torch.as_tensor(np.asarray(trained), dtype=dtype).clone()
        if betas.shape != (steps,):
            raise ValueError(
                f"trained_betas must hold num_train_timesteps = {steps} values, "
                f"got shape {list(betas.shape)}"
            )
    elif schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=dtype)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=dtype) ** 2
    elif schedule == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=dtype)) * (end - start) + start
    elif schedule == "squaredcos_cap_v2":
        betas = _from_survival(_cosine, steps, dtype)
    elif schedule == "exp":
        betas = _from_survival(_exponential, steps, dtype)
    elif schedule == "laplace":
        betas = _from_survival(_laplace, steps, dtype)
    else:
        options = ", ".join(map(repr, BETA_SCHEDULES))
        raise ValueError(f"beta_schedule must be one of {options}, got {schedule!r}")
    if not bool(((betas >= 0) & (betas <= 1)).all()):
        name = "beta_start and beta_end" if trained is None else "trained_betas"
        raise ValueError(f"{name} must give betas in [0, 1], got {_range(betas)}")
    return with_zero_terminal_snr(betas) if zero_snr else betas


def with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that it ends at 0 and starts where it did.

    Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    """
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0], roots[-1]
    roots = (roots - last) * (first / (first - last))
    alphas_cumprod = roots**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def _from_survival(
    alphas_cumprod: Callable[[float], float], steps: int, dtype: torch.dtype
) -> Tensor:
    """Betas under which `alphas_cumprod(time in [0, 1])` survives, as far as the cap allows."""
    times = [step / steps for step in range(steps + 1)]
    levels = [alphas_cumprod(time) for time in times]
    ratios = [after / before for before, after in pairwise(levels)]
    return torch.tensor([min(1 - ratio, _MAX_BETA) for ratio in ratios], dtype=dtype)


def _cosine(time: float) -> float:
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


def _exponential(time: float) -> float:
    return math.exp(time * -12.0)


def _laplace(time: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - time) * math.log(1 - 2 * abs(0.5 - time) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _range(values: Tensor) -> str:
    return f"values from {values.min().item():g} to {values.max().item():g}"
