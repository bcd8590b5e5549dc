"""Which of the training timesteps a sampler visits.

Source: Lin et al. 2023, arXiv:2305.08891, table 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SPACINGS = ("leading", "trailing", "linspace")


def check_steps(num_inference_steps: object, num_train_timesteps: int) -> int:
    if isinstance(num_inference_steps, bool) or not isinstance(
        num_inference_steps, (int, np.integer)
    ):
        raise ValueError(f"num_inference_steps must be an int, got {num_inference_steps!r}")
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must lie in [1, num_train_timesteps = {num_train_timesteps}], "
            f"got {num_inference_steps}"
        )
    return int(num_inference_steps)


def spaced_timesteps(
    spacing: str,
    steps: int,
    num_train_timesteps: int,
    steps_offset: int = 0,
    *,
    extra_timestep: bool = False,
) -> np.ndarray:
    """`[steps]` timesteps in float64, from noise to data; whole numbers but for "linspace".

    | spacing    | timesteps, ascending                                       |
    |------------|------------------------------------------------------------|
    | "linspace" | `steps` points from 0 to T - 1, both included              |
    | "leading"  | i * (T // steps) + steps_offset                            |
    | "trailing" | round(T - i * T / steps) - 1, so that T - 1 is included    |

    Counting down from T by T / steps in floating point may reach one value more, close to 0.
    `extra_timestep` keeps it (it rounds to the timestep -1), as diffusers does.
    """
    if spacing == "linspace":
        return np.linspace(0, num_train_timesteps - 1, steps)[::-1].copy()
    if spacing == "leading":
        ratio = num_train_timesteps // steps
        return np.arange(steps - 1, -1, -1, dtype=np.float64) * ratio + steps_offset
    if spacing == "trailing":
        counted = np.arange(num_train_timesteps, 0, -num_train_timesteps / steps)
        return np.round(counted if extra_timestep else counted[:steps]) - 1
    options = ", ".join(map(repr, SPACINGS))
    raise ValueError(f"timestep_spacing must be one of {options}, got {spacing!r}")


def check_custom_timesteps(timesteps: Sequence[int], num_train_timesteps: int) -> np.ndarray:
    """Timesteps that a caller chose: whole numbers, descending, inside the training schedule."""
    values = np.asarray(timesteps)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"timesteps must be a list of at least one, got {timesteps!r}")
    if not np.all(np.isfinite(values)) or np.any(values != np.round(values)):
        raise ValueError(f"timesteps must be whole numbers, got {timesteps!r}")
    if np.any(values[1:] >= values[:-1]):
        raise ValueError(f"timesteps must be descending, got {timesteps!r}")
    if values[0] >= num_train_timesteps or values[-1] < 0:
        raise ValueError(
            f"timesteps must lie in [0, num_train_timesteps = {num_train_timesteps}), "
            f"got {values[0]} to {values[-1]}"
        )
    return values.astype(np.int64)
