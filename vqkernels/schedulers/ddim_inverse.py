"""DDIM run backwards, from data to noise. Song et al. 2020, arXiv:2010.02502."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels.schedulers._beta_scheduler import BetaScheduler, TrainedBetas
from vqkernels.schedulers._config import configured
from vqkernels.schedulers._prediction import data_weights, noise_weights
from vqkernels.schedulers.ddim import DDIMSchedulerOutput


class DDIMInverseScheduler(BetaScheduler):
    """The deterministic DDIM step towards more noise, timesteps ascending.

    With a' = alphas_cumprod[t] of the level to reach, a that of the timestep before it in the
    schedule (at the start 1, or alphas_cumprod[0] under set_alpha_to_one=False), data x and noise
    e as predicted from the sample at level a:

        prev_sample = sqrt(a') x + sqrt(1 - a') e

    Args:
        num_train_timesteps .. rescale_betas_zero_snr: as in diffusers; docs/schedulers.md lists
            them.
        numerics, compat: as for DDIMScheduler.

    Raises:
        ValueError: an argument that does not fit.
    """

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: TrainedBetas = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        self._set_betas()
        self._set_threshold()
        self.initial_alpha_cumprod = (
            torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        )
        self.timesteps = torch.arange(num_train_timesteps)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Lay out the levels that `num_inference_steps` model calls reach.

        Raises:
            ValueError: a number of steps outside of [1, num_train_timesteps]; a `prediction_type`
                that doesn't tell the noise where the schedule starts.
        """
        timesteps = torch.from_numpy(self._spaced(num_inference_steps)).flip(0)
        self.num_inference_steps = num_inference_steps
        self._lay_out(timesteps, device)

    def _source(self, row: int) -> int:
        """The timestep that a row starts from, negative at the start."""
        if "linspace_previous_timestep" in self.compat:
            assert self.num_inference_steps is not None
            before = int(self._values[row]) - len(self) // self.num_inference_steps
            return min(before, len(self) - 1)
        return int(self._values[row - 1]) if row > 0 else -1

    def _columns(self, **options: Any) -> dict[str, Tensor | float]:
        initial = 1.0 if self.config.set_alpha_to_one else float(self._alphas_cumprod[0])
        a_next = self._alphas_cumprod[[int(t) for t in self._values]]
        a = self._levels_before([self._source(row) for row in range(len(a_next))], initial)
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        kind = self.config.prediction_type
        data_sample, data_output = data_weights(kind, alpha, sigma)
        noise_sample, noise_output = noise_weights(kind, alpha, sigma)
        return {
            "prediction_sample": data_sample,
            "prediction_output": data_output,
            "clip": self._clip(),
            "prev_sample": (1 - a_next).sqrt() * noise_sample,
            "prev_prediction": a_next.sqrt(),
            "prev_output": (1 - a_next).sqrt() * noise_output,
        }

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
        want_prediction: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The noisier sample at `timestep`; arguments and errors as for `DDIMScheduler.step`."""
        self._check_exact(uncond_output=uncond_output)
        row = self._row(timestep)
        data: Tensor | None
        if self.numerics == "diffusers":
            previous, data = self._step_as_diffusers(model_output, row, sample)
        else:
            previous, data = self._advance(
                sample,
                model_output,
                row,
                uncond_output=uncond_output,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                want_prediction=want_prediction,
            )
        self._step_index = row + 1
        return DDIMSchedulerOutput(previous, data) if return_dict else (previous, data)

    def _step_as_diffusers(
        self, model_output: Tensor, row: int, sample: Tensor
    ) -> tuple[Tensor, Tensor]:
        source = self._source(row)
        a = self.alphas_cumprod[source] if source >= 0 else self.initial_alpha_cumprod
        a_next = self.alphas_cumprod[int(self._values[row])]
        data = self._clipped_as_diffusers(self._data_as_diffusers(model_output, sample, a))
        direction = self._noise_as_diffusers(model_output, sample, a)
        return a_next**0.5 * data + (1 - a_next) ** 0.5 * direction, data
