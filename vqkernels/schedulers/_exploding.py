"""Schedulers of betas-trained models, sampled as x0 + sigma z: Euler, its ancestral form, Heun.

A sample is scaled by 1 / sqrt(alphas_cumprod), so that its data keeps the weight 1 and its noise
"explodes" to sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod); the model sees it scaled back.
Karras et al. 2022, arXiv:2206.00364.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqkernels.schedulers._beta_scheduler import BetaScheduler
from vqkernels.schedulers._sigma_scheduler import AdditiveScheduler
from vqkernels.schedulers._sigmas import (
    Levels,
    given_levels,
    respaced_like,
    respacing_of,
    sigma_to_t,
    variance_exploding_sigmas,
)
from vqkernels.schedulers._spacing import check_steps, spaced_timesteps

# Close to 0 without an infinite sigma, as in diffusers.
_LEAST_ALPHA = 2.0**-24


class Readings(NamedTuple):
    """What a model's output says: weights of sample and output in the data and in the slope."""

    data_sample: Tensor
    data_output: Tensor
    slope_sample: Tensor  # (sample - data) / sigma = d sample / d sigma
    slope_output: Tensor


class ExplodingScheduler(AdditiveScheduler, BetaScheduler):
    """Levels from betas, spacings of timesteps and of levels, what predictions mean."""

    _trained: Levels  # sigma of each training timestep, ascending

    def _set_exploding(self) -> None:
        self._set_betas()
        self._respacing = respacing_of(self.config)
        if self.config.get("rescale_betas_zero_snr"):
            self.alphas_cumprod[-1] = self._alphas_cumprod[-1] = _LEAST_ALPHA
        rounded = self.numerics == "diffusers"
        self._trained = variance_exploding_sigmas(
            self.alphas_cumprod if rounded else self._alphas_cumprod
        )

    def _set_sigmas(self, sigmas: Levels) -> None:
        super()._set_sigmas(sigmas)
        highest = self._sigmas.max() if self.numerics == "exact" else self.sigmas.max()
        if self.config.timestep_spacing not in ("linspace", "trailing"):
            highest = (highest**2 + 1) ** 0.5
        self.init_noise_sigma = highest.float()

    def _spaced_times(self, num_inference_steps: int, num_train_timesteps: int) -> Levels:
        times = spaced_timesteps(
            self.config.timestep_spacing,
            check_steps(num_inference_steps, num_train_timesteps),
            num_train_timesteps,
            self.config.steps_offset,
            extra_timestep="trailing_extra_timestep" in self.compat,
        )
        return times.astype(self._precision)

    def _given_times(self, timesteps: Any) -> Levels:
        if self._respacing:
            raise ValueError(
                f"timesteps must not be given with use_{self._respacing}_sigmas=True: the levels "
                f"tell the timesteps, got {timesteps!r}"
            )
        return given_levels("timesteps", timesteps, self._precision)

    def _check_times(self, times: Levels) -> None:
        if times[0] > len(self._trained) - 1:
            raise ValueError(
                f"timesteps (as given, or by steps_offset) must lie in "
                f"[0, num_train_timesteps - 1 = {len(self._trained) - 1}], got {times[0]:g}"
            )

    def _at_times(self, times: Levels) -> Levels:
        return np.interp(times, np.arange(len(self._trained)), self._trained)

    def _respaced(self, levels: Levels, steps: int) -> tuple[Levels, Levels]:
        """`(levels, their timesteps)`, spaced as the config says between the ends of `levels`."""
        assert self._respacing is not None
        spaced = respaced_like(self.config, self._respacing, levels, steps)
        return spaced, self._times_of(spaced)

    def _times_of(self, levels: Levels) -> Levels:
        return sigma_to_t(levels, np.log(self._trained))

    def _readings(self, sigma: Tensor, raised: Tensor) -> Readings:
        """At the level that the model was called with, for a sample churned to `raised`."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            one = torch.ones_like(sigma)
            return Readings(one, -raised, torch.zeros_like(sigma), one)
        if kind == "v_prediction":
            energy = sigma**2 + 1
            kept, output = 1 / energy, sigma / energy.sqrt()
            return Readings(kept, -output, sigma**2 * kept / raised, output / raised)
        return Readings(torch.zeros_like(sigma), torch.ones_like(sigma), 1 / raised, -1 / raised)

    def _exploded_data_as_diffusers(
        self, sample: Tensor, model_output: Tensor, sigma: Tensor, raised: Tensor
    ) -> Tensor:
        kind = self.config.prediction_type
        if kind == "epsilon":
            return sample - raised * model_output
        if kind == "v_prediction":
            scaled = model_output * (-sigma / (sigma**2 + 1) ** 0.5)
            return scaled + sample / (sigma**2 + 1)
        return model_output

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The model's input, sample / sqrt(sigma^2 + 1): of variance 1 for data of variance 1."""
        row = self._next_row(timestep)
        if self.numerics == "diffusers":
            return sample / (self.sigmas[row] ** 2 + 1) ** 0.5
        return sample * (self._host[row] ** 2 + 1) ** -0.5
