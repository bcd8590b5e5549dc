"""Latent consistency models. Luo et al. 2023, arXiv:2310.04378."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqkernels.schedulers._beta_scheduler import BetaScheduler, TrainedBetas
from vqkernels.schedulers._config import configured
from vqkernels.schedulers._noise import Generators
from vqkernels.schedulers._prediction import data_weights
from vqkernels.schedulers._scheduler import SchedulerOutput
from vqkernels.schedulers._spacing import check_custom_timesteps, check_steps

_SIGMA_DATA = 0.5


@dataclass
class LCMSchedulerOutput(SchedulerOutput):
    """`denoised` is what the consistency function makes of the sample."""

    denoised: Tensor | None = None


class LCMScheduler(BetaScheduler):
    """Jump to data with the consistency function, noise it to the next level, repeat.

    With a' = alphas_cumprod at the next timestep, data x as predicted, r = timestep_scaling t:

        denoised = c_out x + c_skip sample,
            c_skip = 0.25 / (r^2 + 0.25),  c_out = r / sqrt(r^2 + 0.25)
        prev_sample = sqrt(a') denoised + sqrt(1 - a') z;  after the last step denoised

    The timesteps are taken from the `original_inference_steps` that the model was distilled on.

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
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: TrainedBetas = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        self._set_betas()
        self._set_threshold()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.custom_timesteps = False
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Lay out a number of steps, or exactly these descending `timesteps`.

        Args:
            num_inference_steps, timesteps: give one of them.
            device: where the timesteps and the table go.
            original_inference_steps: of the distillation, by default the config's.
            strength: in (0, 1], the share of the schedule that is run, for image to image.

        Raises:
            ValueError: both or neither given; a number of steps that the distillation schedule
                doesn't have; timesteps that are not descending or outside of the schedule.
        """
        if (num_inference_steps is None) == (timesteps is None):
            both = "neither" if timesteps is None else "both"
            raise ValueError(f"give num_inference_steps or timesteps, got {both}")
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {strength}")
        origin = self._distilled(original_inference_steps, strength)
        self.custom_timesteps = timesteps is not None
        if timesteps is not None:
            values = check_custom_timesteps(timesteps, len(self))
            self.num_inference_steps = len(values)
            values = values[len(values) - int(len(values) * strength) :]
            if len(values) == 0:
                raise ValueError(f"strength must leave a timestep, got {strength}")
            _warn_of_others(values, origin)
        else:
            steps = check_steps(num_inference_steps, len(self))
            if steps > len(origin):
                raise ValueError(
                    f"num_inference_steps must be at most {len(origin)}, "
                    f"original_inference_steps times strength, got {steps}"
                )
            self.num_inference_steps = steps
            places = np.linspace(0, len(origin), num=steps, endpoint=False)
            values = origin[np.floor(places).astype(np.int64)]
        self._lay_out(torch.from_numpy(values.copy()), device)

    def _distilled(self, original_inference_steps: int | None, strength: float) -> np.ndarray:
        """The timesteps of the distillation, descending."""
        original = original_inference_steps
        if original is None:
            original = self.config.original_inference_steps
        if not 1 <= original <= len(self):
            raise ValueError(
                f"original_inference_steps must lie in [1, num_train_timesteps = {len(self)}], "
                f"got {original}"
            )
        count = int(original * strength)
        return np.arange(count, 0, -1) * (len(self) // original) - 1

    def get_scalings_for_boundary_condition_discrete(self, timestep: Any) -> tuple[Any, Any]:
        """`(c_skip, c_out)` of a timestep."""
        scaled = timestep * self.config.timestep_scaling
        c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + _SIGMA_DATA**2) ** 0.5
        return c_skip, c_out

    def _is_noisy(self, row: int) -> bool:
        if "final_step_noise" in self.compat:
            assert self.num_inference_steps is not None
            return row != self.num_inference_steps - 1
        return row + 1 < len(self._values)

    def _next(self, row: int) -> int:
        return int(self._values[min(row + 1, len(self._values) - 1)])

    def _columns(self, **options: Any) -> dict[str, Tensor | float]:
        rows = range(len(self._values))
        t = torch.tensor(self._values, dtype=torch.float64)
        a = self._alphas_cumprod[t.long()]
        a_next = self._alphas_cumprod[[self._next(row) for row in rows]]
        noisy = torch.tensor([self._is_noisy(row) for row in rows])
        kept = torch.where(noisy, a_next.sqrt(), 1.0)
        c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(t)
        data_sample, data_output = data_weights(
            self.config.prediction_type, a.sqrt(), (1 - a).sqrt()
        )
        return {
            "prediction_sample": data_sample,
            "prediction_output": data_output,
            "clip": self._clip(),
            "prev_sample": kept * c_skip,
            "prev_prediction": kept * c_out,
            "prev_noise": torch.where(noisy, (1 - a_next).sqrt(), 0.0),
            "extra_sample": c_skip,
            "extra_prediction": c_out,
        }

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        variance_noise: Tensor | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
        want_prediction: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The sample at the next timestep; the first call's timestep tells where to start.

        Arguments and errors are those of `DDIMScheduler.step`; `want_prediction` is about
        `denoised`.
        """
        self._check_exact(uncond_output=uncond_output)
        row = self._next_row(timestep)
        noise = {}
        if self._is_noisy(row):
            noise = self._noise(
                model_output,
                row,
                noise=variance_noise,
                generator=generator,
                seed=seed,
                sample_ids=sample_ids,
                dtype=torch.promote_types(model_output.dtype, sample.dtype),
            )
        denoised: Tensor | None
        if self.numerics == "diffusers":
            previous, denoised = self._step_as_diffusers(
                model_output, timestep, row, sample, noise.get("noise")
            )
        else:
            previous, denoised = self._advance(
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
        return LCMSchedulerOutput(previous, denoised) if return_dict else (previous, denoised)

    def _advance(
        self, sample: Tensor, model_output: Tensor, index: int | Tensor, **operands: Any
    ) -> tuple[Tensor, Tensor | None]:
        operands |= {"want_extra": operands.get("want_prediction", True), "want_prediction": False}
        result = self._denoise(sample, model_output, index, **operands)
        return result.prev_sample, result.extra

    def _step_as_diffusers(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        row: int,
        sample: Tensor,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        a = self.alphas_cumprod[int(self._values[row])]
        a_next = self.alphas_cumprod[self._next(row)]
        data = self._clipped_as_diffusers(self._data_as_diffusers(model_output, sample, a))
        # In the timestep's own type: a tensor's arithmetic is float32, a number's float64.
        c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(timestep)
        denoised = c_out * data + c_skip * sample
        if noise is None:
            return denoised, denoised
        return a_next.sqrt() * denoised + (1 - a_next).sqrt() * noise, denoised


def _warn_of_others(timesteps: np.ndarray, origin: np.ndarray) -> None:
    others = sorted(set(timesteps.tolist()) - set(origin.tolist()), reverse=True)
    if others:
        warnings.warn(
            f"the model was not distilled on the timesteps {others}: "
            "results there may be unexpected",
            stacklevel=3,
        )
