"""Heun steps of the probability flow ODE. Karras et al. 2022, arXiv:2206.00364, algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqkernels.schedulers._beta_scheduler import TrainedBetas
from vqkernels.schedulers._config import configured
from vqkernels.schedulers._exploding import ExplodingScheduler
from vqkernels.schedulers._heun import HeunPairs, doubled
from vqkernels.schedulers._karras import KARRAS_SCHEDULERS
from vqkernels.schedulers._scheduler import PredictionOutput


@dataclass
class HeunDiscreteSchedulerOutput(PredictionOutput):
    pass


class HeunDiscreteScheduler(HeunPairs, ExplodingScheduler):
    """Deterministic sampling of second order, two model calls a level but for the last.

    With s = sigma at a level, s' at the next one and slopes d = (sample - x0) / sigma:

        first call:   prev_sample = sample + (s' - s) d
        second call:  prev_sample = the first call's sample + (s' - s) (d of the first + d) / 2

    Args:
        num_train_timesteps .. steps_offset: as in diffusers; docs/schedulers.md lists them.
        numerics: "exact", or "diffusers" for its order of operations and roundings.
        compat: names of faults of diffusers to reproduce; by default none under "exact", all
            under "diffusers".

    Raises:
        ImportError: `use_beta_sigmas` without scipy.
        ValueError: an argument that does not fit.
    """

    _compatibles = KARRAS_SCHEDULERS
    _defaults: ClassVar[dict[str, Any]] = {}

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: TrainedBetas = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        self._set_exploding()
        self._set_threshold()
        self.timesteps = self._scheduled(num_train_timesteps, num_train_timesteps)

    def _set_threshold(self) -> None:
        """Clipping alone: a config may carry the thresholding of another class."""
        self._bounds_predictions = True
        self._threshold = "clip" if self.config.clip_sample else "none"

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Lay out the model calls at so many levels, or at those of these timesteps.

        Args:
            num_inference_steps: the number n of levels; there are 2 n - 1 model calls.
            num_train_timesteps: what the spacing divides, by default the config's.
            timesteps: in [0, num_train_timesteps - 1], descending.

        Raises:
            ValueError: neither or both of `num_inference_steps` and `timesteps`; values that do
                not fit; `timesteps` where the config spaces levels (`use_karras_sigmas`, ...).
        """
        if (num_inference_steps is None) == (timesteps is None):
            given = "neither" if timesteps is None else "both"
            raise ValueError(f"give num_inference_steps or timesteps, got {given}")
        trained = num_train_timesteps or self.config.num_train_timesteps
        times = self._scheduled(num_inference_steps, trained, timesteps)
        self._check_times(times.numpy())
        self._first = None
        self._lay_out(times, device)

    def _scheduled(
        self, steps: int | None, num_train_timesteps: int, timesteps: Any = None
    ) -> Tensor:
        if timesteps is not None:
            times = self._given_times(timesteps)
            steps = len(times)
        else:
            assert steps is not None
            times = self._spaced_times(steps, num_train_timesteps)
        levels = self._at_times(times)
        if self._respacing:
            levels, times = self._respaced(levels, steps)
        self.num_inference_steps = steps
        self._set_sigmas(np.append(doubled(levels), 0.0))
        return torch.from_numpy(doubled(times).astype(np.float32))

    def _columns(self, **options: Any) -> dict[str, Tensor | float]:
        sigma = self._sigmas[:-1]
        readings = self._readings(sigma, sigma)
        if self._threshold == "none":
            slope = {"sample": readings.slope_sample, "output": readings.slope_output}
        else:  # towards the clipped data
            slope = {"sample": 1 / sigma, "prediction": -1 / sigma}
        return {
            "prediction_sample": readings.data_sample,
            "prediction_output": readings.data_output,
            "clip": self._clip(),
            **self._pairs(self._changes(sigma), **slope),
        }

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
        want_prediction: bool = True,
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The sample at the next level as the first or the second call of a level has it.

        Args:
            model_output, sample: `[B, ...]`; a first call's sample is kept, not copied, for the
                second one.
            timestep: one of `timesteps`. It tells the first step of a loop; later ones follow in
                order.
            return_dict: a HeunDiscreteSchedulerOutput, else
                `(prev_sample, pred_original_sample)`.
            uncond_output, guidance_scale, guidance_rescale: classifier-free guidance in the same
                pass, `model_output` being the conditional one; numbers, or one value a sample.
                arXiv:2207.12598, arXiv:2305.08891.
            want_prediction: False leaves out `pred_original_sample`, one tensor less to write.

        Raises:
            ValueError: no `set_timesteps` before, a timestep outside of the schedule, a loop that
                begins at a second call.
        """
        self._check_exact(uncond_output=uncond_output)
        row = self._next_row(timestep)
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
        return HeunDiscreteSchedulerOutput(previous, data) if return_dict else (previous, data)

    def _step_as_diffusers(
        self, model_output: Tensor, row: int, sample: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        first = self._taken(row)
        sigma = self.sigmas[row]
        data = self._exploded_data_as_diffusers(sample, model_output, sigma, sigma)
        data = self._clipped_as_diffusers(data)
        slope = (sample - data) / sigma
        if first is None:
            self._first = sample, slope
            return sample + slope * (self.sigmas[row + 1] - sigma), data
        first_sample, first_slope = first
        change = sigma - self.sigmas[row - 1]
        return first_sample + (first_slope + slope) / 2 * change, data
