"""Denoising diffusion probabilistic models. Ho et al. 2020, arXiv:2006.11239."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice
from vqkernels.ops.denoise_step import COLUMNS
from vqkernels.schedulers._beta_scheduler import BetaScheduler, TrainedBetas
from vqkernels.schedulers._config import configured
from vqkernels.schedulers._karras import KARRAS_SCHEDULERS
from vqkernels.schedulers._noise import Generators
from vqkernels.schedulers._prediction import data_weights
from vqkernels.schedulers._scheduler import PredictionOutput
from vqkernels.schedulers._spacing import check_custom_timesteps

LEARNED = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", *LEARNED)
_SMALLEST_VARIANCE = 1e-20  # its logarithm is taken


@dataclass
class DDPMSchedulerOutput(PredictionOutput):
    pass


class DDPMScheduler(BetaScheduler):
    """Ancestral sampling: the posterior mean of each step and noise of its variance.

    With a = alphas_cumprod[t], a' = alphas_cumprod at the next timestep of the schedule (1 at the
    end), b = 1 - a / a' and data x as predicted (equation 7 of the paper):

        prev_sample = sqrt(a') b / (1 - a) x + sqrt(a / a') (1 - a') / (1 - a) sample + s z

    | variance_type                    | s^2                                                   |
    |----------------------------------|-------------------------------------------------------|
    | "fixed_small", "fixed_small_log" | (1 - a') / (1 - a) b, at least 1e-20                  |
    | "fixed_large", "fixed_large_log" | b                                                     |
    | "learned"                        | what the model says                                   |
    | "learned_range"                  | between the two above in the logarithm, by what the   |
    |                                  | model says (-1 to 1), arXiv:2102.09672, equation 15   |

    The last step has no noise. A model of a learned variance returns it in a second half of
    channels. Without `set_timesteps` every training timestep is a step.

    Args:
        num_train_timesteps .. rescale_betas_zero_snr: as in diffusers; docs/schedulers.md lists
            them.
        numerics, compat: as for DDIMScheduler.

    Raises:
        ValueError: an argument that does not fit.
    """

    _compatibles = KARRAS_SCHEDULERS

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: TrainedBetas = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        self._set_betas()
        self._set_threshold()
        self.variance_type = variance_type
        self.custom_timesteps = False
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Lay out a number of steps, or exactly these descending `timesteps`.

        Raises:
            ValueError: both or neither; a number outside of [1, num_train_timesteps]; timesteps
                that are not descending or outside of the training schedule.
        """
        if (num_inference_steps is None) == (timesteps is None):
            both = "neither" if timesteps is None else "both"
            raise ValueError(f"give num_inference_steps or timesteps, got {both}")
        self.custom_timesteps = timesteps is not None
        if timesteps is not None:
            values = check_custom_timesteps(timesteps, len(self))
        else:
            assert num_inference_steps is not None
            values = self._spaced(num_inference_steps)
            self.num_inference_steps = num_inference_steps
        self._lay_out(torch.from_numpy(values), device)

    def _check_laid_out(self) -> None:
        if not hasattr(self, "_rows_of"):
            self._lay_out(self.timesteps)

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep that a step from this one arrives at, -1 at the end."""
        return self._previous(self.index_for_timestep(timestep))

    def _previous(self, row: int) -> int:
        return int(self._values[row + 1]) if row + 1 < len(self._values) else -1

    def _is_noisy(self, row: int) -> bool:
        if "final_step_noise" in self.compat:
            return self._values[row] > 0
        return row + 1 < len(self._values)

    def _columns(self, **options: Any) -> dict[str, Tensor | float]:
        rows = range(len(self._values))
        a = self._alphas_cumprod[[int(t) for t in self._values]]
        a_prev = self._levels_before([self._previous(row) for row in rows], 1.0)
        b = 1 - a / a_prev
        small = ((1 - a_prev) / (1 - a) * b).clamp(min=_SMALLEST_VARIANCE)
        noisy = torch.tensor([self._is_noisy(row) for row in rows], dtype=torch.float64)

        kind = self.variance_type
        if kind in LEARNED:
            std = noisy
        else:
            std = noisy * (small if kind.startswith("fixed_small") else b).sqrt()
        data_sample, data_output = data_weights(
            self.config.prediction_type, a.sqrt(), (1 - a).sqrt()
        )
        return {
            "prediction_sample": data_sample,
            "prediction_output": data_output,
            "clip": self._clip(),
            "prev_sample": (a / a_prev).sqrt() * (1 - a_prev) / (1 - a),
            "prev_prediction": a_prev.sqrt() * b / (1 - a),
            "prev_noise": std,
            "variance_log_min": small.log(),
            "variance_log_max": b.log(),
        }

    def _tabulate(self, **options: Any) -> Tensor:
        fresh = self._table is None
        table = super()._tabulate(**options)
        if fresh and self.variance_type == "fixed_large_log" and self._fails_at_large_log():
            noise = table[:, COLUMNS.index("prev_noise")]
            noise[noise != 0] = math.nan
        return table

    def _fails_at_large_log(self) -> bool:
        return "fixed_large_log" in self.compat

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
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The sample at the next timestep of the schedule.

        Args:
            model_output, uncond_output: sample's shape, or twice its channels (dimension 1) where
                the variance is learned; the variance is the conditional output's.
            timestep, sample, generator, return_dict, seed, sample_ids, variance_noise,
            guidance_scale, guidance_rescale, want_prediction: as for `DDIMScheduler.step`.

        Raises:
            ValueError: a timestep outside of the schedule, channels that do not fit the variance
                type, more than one source of noise.
        """
        self._check_exact(uncond_output=uncond_output)
        row = self._row(timestep)
        output, variance = self._split(model_output, sample)
        noise = {}
        if self._is_noisy(row):
            noise = self._noise(
                output,
                row,
                noise=variance_noise,
                generator=generator,
                seed=seed,
                sample_ids=sample_ids,
            )
        data: Tensor | None
        if self.numerics == "diffusers":
            previous, data = self._step_as_diffusers(
                output, row, sample, variance, noise.get("noise")
            )
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
        return DDPMSchedulerOutput(previous, data) if return_dict else (previous, data)

    def _advance(
        self, sample: Tensor, model_output: Tensor, index: int | Tensor, **operands: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, variance = self._split(model_output, sample)
        if variance is not None:
            operands |= {"variance": variance, "variance_type": self.variance_type}
        if operands.get("uncond_output") is not None:
            operands["uncond_output"], _ = self._split(operands["uncond_output"], sample)
        return super()._advance(sample, output, index, **operands)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output and, where it is learned, the variance: halves of the channels."""
        if self.variance_type not in LEARNED:
            return model_output, None
        if model_output.dim() < 2 or model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"model_output must have twice the sample's channels for variance_type "
                f"{self.variance_type!r}, got {list(model_output.shape)} for a sample "
                f"{list(sample.shape)}"
            )
        output, variance = model_output.split(sample.shape[1], dim=1)
        return output, variance

    def _step_as_diffusers(
        self,
        output: Tensor,
        row: int,
        sample: Tensor,
        learned: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        before = self._previous(row)
        a = self.alphas_cumprod[int(self._values[row])]
        a_prev = self.alphas_cumprod[before] if before >= 0 else torch.tensor(1.0)
        data = self._clipped_as_diffusers(self._data_as_diffusers(output, sample, a))
        ratio = a / a_prev
        b = 1 - ratio
        mean = a_prev**0.5 * b / (1 - a) * data + ratio**0.5 * (1 - a_prev) / (1 - a) * sample
        if noise is None:
            return mean, data

        small = torch.clamp((1 - a_prev) / (1 - a) * b, min=_SMALLEST_VARIANCE)
        kind = self.variance_type
        if kind == "learned_range":
            assert learned is not None
            share = (learned + 1) / 2
            std = torch.exp(0.5 * (share * torch.log(b) + (1 - share) * torch.log(small)))
        elif kind == "learned":
            assert learned is not None
            std = learned**0.5
        elif kind == "fixed_small_log":
            std = torch.exp(0.5 * torch.log(small))
        elif kind == "fixed_large_log":
            fails = self._fails_at_large_log()
            std = torch.log(b) ** 0.5 if fails else torch.exp(0.5 * torch.log(b))
        else:
            std = (small if kind == "fixed_small" else b) ** 0.5
        return mean + std * noise, data
