"""Schedulers of rectified flows: x = (1 - sigma) x0 + sigma z, the model predicts z - x0.

Liu et al. 2022, arXiv:2209.03003. The level sigma is the time; models see sigma * T.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqkernels.schedulers._sigma_scheduler import SigmaScheduler
from vqkernels.schedulers._sigmas import Levels, shift_sigmas
from vqkernels.schedulers._spacing import check_steps


class FlowScheduler(SigmaScheduler):
    """The training schedule T / T, (T - 1) / T, .. 1 / T, its shift, noising on straight paths.

    `sigma_min` and `sigma_max` are the ends of the shifted training schedule.
    """

    sigma_min: float
    sigma_max: float
    _limits: tuple[float, float]  # of the times that `set_timesteps` spaces evenly and shifts

    def _set_flow(self, shift: float | None) -> None:
        """The schedule until `set_timesteps`; unshifted for None."""
        steps = self.config.num_train_timesteps
        if shift is not None and not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        even = torch.arange(steps, 0, -1, dtype=self._dtype) / steps
        sigmas = even if shift is None else shift_sigmas(even, shift)
        self._set_sigmas(sigmas.numpy())
        self.timesteps = (sigmas * steps).float()
        self.sigma_max, self.sigma_min = self.sigmas[0].item(), self.sigmas[-1].item()
        shifted_twice = sigmas if "double_shift" in self.compat else even
        self._limits = shifted_twice[0].item(), shifted_twice[-1].item()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.numerics == "diffusers" else torch.float64

    def _even_times(self, num_inference_steps: int | None) -> Levels:
        """Evenly spaced times in [0, T], before any shift."""
        train = self.config.num_train_timesteps
        steps = check_steps(num_inference_steps, train)
        times: Levels = np.linspace(self._limits[0] * train, self._limits[1] * train, steps)
        return times

    def _data_weight(self, sigma: Tensor) -> Tensor:
        return 1 - sigma

    def _mix_as_diffusers(self, data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return sigma * noise + (1.0 - sigma) * data

    def scale_noise(
        self, sample: Tensor, timestep: Tensor | float, noise: Tensor | None = None
    ) -> Tensor:
        """(1 - sigma(t)) sample + sigma(t) noise.

        Args:
            sample: `[B, ...]`.
            timestep: of the schedule; a number, `[]`, `[B]`, or more of the sample's leading
                dimensions (a timestep a token: `[B, N]` for samples `[B, N, D]`). Once a loop
                has begun (`set_begin_index`, `step`), noise is that of its present step.
            noise: sample's shape.

        Raises:
            ValueError: a shape or device that does not fit; a timestep outside of the schedule.
        """
        return self._noised(sample, noise, timestep, "sample")
