"""Ancestral sampling with Euler steps: each goes further down than asked and adds noise back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqkernels.schedulers._beta_scheduler import TrainedBetas
from vqkernels.schedulers._config import configured
from vqkernels.schedulers._exploding import ExplodingScheduler
from vqkernels.schedulers._karras import KARRAS_SCHEDULERS
from vqkernels.schedulers._noise import Generators
from vqkernels.schedulers._scheduler import PredictionOutput


@dataclass
class EulerAncestralDiscreteSchedulerOutput(PredictionOutput):
    pass


class EulerAncestralDiscreteScheduler(ExplodingScheduler):
    """Stochastic sampling: an Euler step to `down`, then noise `up`.

    With s = sigma at a step, s' at the next one and the data x0 as predicted (the variance of
    arXiv:2006.11239's posterior):

        up   = s' sqrt(s^2 - s'^2) / s
        down = sqrt(s'^2 - up^2) = s'^2 / s
        prev_sample = sample + (down - s) (sample - x0) / s + up z

    Args:
        num_train_timesteps .. rescale_betas_zero_snr: as in diffusers; docs/schedulers.md lists
            them.
        numerics: "exact", or "diffusers" for its order of operations and roundings.
        compat: names of faults of diffusers to reproduce; by default none under "exact", all
            under "diffusers".

    Raises:
        ValueError: an argument that does not fit.
    """

    _compatibles = KARRAS_SCHEDULERS
    _defaults: ClassVar[dict[str, Any]] = {}

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: TrainedBetas = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        self._set_exploding()
        self._set_sigmas(np.append(self._trained[::-1], 0.0))
        self.timesteps = torch.arange(num_train_timesteps, dtype=torch.float64).flip(0)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Lay out `num_inference_steps` model calls.

        Raises:
            ValueError: a number of steps outside of [1, num_train_timesteps].
        """
        times = self._spaced_times(num_inference_steps, self.config.num_train_timesteps)
        self._check_times(times)
        self.num_inference_steps = num_inference_steps
        self._set_sigmas(np.append(self._at_times(times), 0.0))
        self._lay_out(torch.from_numpy(times.astype(np.float32)), device)

    def _columns(self, **options: Any) -> dict[str, Tensor | float]:
        sigma, following = self._sigmas[:-1], self._sigmas[1:]
        readings = self._readings(sigma, sigma)
        change = following**2 / sigma - sigma
        return {
            "prediction_sample": readings.data_sample,
            "prediction_output": readings.data_output,
            "prev_sample": 1 + change * readings.slope_sample,
            "prev_output": change * readings.slope_output,
            "prev_noise": following * (sigma**2 - following**2).sqrt() / sigma,
        }

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
        want_prediction: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The sample at the next level.

        Args:
            model_output, sample: `[B, ...]`.
            timestep: one of `timesteps`, not its number. It tells the first step of a loop; later
                ones follow in order.
            generator: draws the noise as in diffusers; or one generator a sample.
            return_dict: an EulerAncestralDiscreteSchedulerOutput, else
                `(prev_sample, pred_original_sample)`.
            seed, sample_ids: key the noise by sample and step instead, `vqkernels.normal_noise`
                with stream 1 and step = row of the schedule; it is drawn inside the step.
            uncond_output, guidance_scale, guidance_rescale: classifier-free guidance in the same
                pass, `model_output` being the conditional one; numbers, or one value a sample.
                arXiv:2207.12598, arXiv:2305.08891.
            want_prediction: False leaves out `pred_original_sample`, one tensor less to write.

        Raises:
            ValueError: no `set_timesteps` before, an integer timestep or one outside of the
                schedule, both `generator` and `seed`.
        """
        self._check_timestep(timestep)
        self._check_exact(uncond_output=uncond_output)
        row = self._next_row(timestep)
        noise = self._noise(
            model_output,
            row,
            generator=generator,
            seed=seed,
            sample_ids=sample_ids,
            dtype=model_output.dtype,
        )
        if self.numerics == "diffusers":
            previous, data = self._step_as_diffusers(model_output, row, sample, noise["noise"])
        else:
            previous, data = self._advance(
                sample,
                model_output,
                row,
                uncond_output=uncond_output,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                want_prediction=want_prediction,
                **noise,
            )
        self._step_index = row + 1
        if not return_dict:
            return previous, data
        return EulerAncestralDiscreteSchedulerOutput(previous, data)

    def _step_as_diffusers(
        self, model_output: Tensor, row: int, sample: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        sample = sample.to(torch.float32)
        sigma, following = self.sigmas[row], self.sigmas[row + 1]
        data = self._exploded_data_as_diffusers(sample, model_output, sigma, sigma)
        up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
        rest = following**2 - up**2
        down = (rest if "ancestral_nan" in self.compat else rest.clamp(min=0)) ** 0.5
        previous = sample + (sample - data) / sigma * (down - sigma) + noise * up
        return previous.to(model_output.dtype), data
