"""Denoising diffusion implicit models. Song et al. 2020, arXiv:2010.02502."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqkernels.schedulers._beta_scheduler import BetaScheduler, TrainedBetas
from vqkernels.schedulers._config import configured
from vqkernels.schedulers._karras import KARRAS_SCHEDULERS
from vqkernels.schedulers._noise import Generators
from vqkernels.schedulers._prediction import data_weights, noise_weights
from vqkernels.schedulers._scheduler import PredictionOutput


@dataclass
class DDIMSchedulerOutput(PredictionOutput):
    pass


class DDIMScheduler(BetaScheduler):
    """Deterministic sampling, or stochastic with `eta > 0` (eta = 1 is DDPM's variance).

    With a = alphas_cumprod[t], a' = alphas_cumprod at the next timestep of the schedule (at the
    end 1, or alphas_cumprod[0] under set_alpha_to_one=False), data x and noise e as predicted
    (equation 12 of the paper):

        s = eta sqrt((1 - a') / (1 - a) (1 - a / a'))
        prev_sample = sqrt(a') x + sqrt(1 - a' - s^2) e + s z

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
    _defaults: ClassVar[dict[str, Any]] = {"eta": 0.0, "use_clipped_model_output": False}

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
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        self._set_betas()
        self._set_threshold()
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Lay out the timesteps of `num_inference_steps` model calls.

        Raises:
            ValueError: a number of steps outside of [1, num_train_timesteps]; timesteps from
                which the config's `prediction_type` can't be inverted.
        """
        timesteps = torch.from_numpy(self._spaced(num_inference_steps))
        self.num_inference_steps = num_inference_steps
        self._lay_out(timesteps, device)

    def _previous(self, row: int) -> int:
        """The timestep that a row arrives at, negative at the end."""
        timesteps = self._values
        if "linspace_previous_timestep" in self.compat:
            assert self.num_inference_steps is not None
            return int(timesteps[row]) - len(self) // self.num_inference_steps
        return int(timesteps[row + 1]) if row + 1 < len(timesteps) else -1

    def _columns(self, **options: Any) -> dict[str, Tensor | float]:
        eta = options["eta"]
        final = 1.0 if self.config.set_alpha_to_one else float(self._alphas_cumprod[0])
        a = self._alphas_cumprod[[int(t) for t in self._values]]
        a_prev = self._levels_before([self._previous(row) for row in range(len(a))], final)
        std = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).clamp(min=0).sqrt()
        direction_squared = 1 - a_prev - std**2
        if bool((direction_squared < -1e-12).any()):
            raise ValueError(f"eta must not add more noise than a step has, got {eta}")
        direction = direction_squared.clamp(min=0).sqrt()

        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        kind = self.config.prediction_type
        data_sample, data_output = data_weights(kind, alpha, sigma)
        columns: dict[str, Tensor | float] = {
            "prediction_sample": data_sample,
            "prediction_output": data_output,
            "clip": self._clip(),
            "prev_noise": std,
        }
        if options["use_clipped_model_output"]:  # e = (x_t - alpha x) / sigma
            columns["prev_sample"] = direction / sigma
            columns["prev_prediction"] = a_prev.sqrt() - direction * alpha / sigma
        else:
            noise_sample, noise_output = noise_weights(kind, alpha, sigma)
            columns["prev_sample"] = direction * noise_sample
            columns["prev_prediction"] = a_prev.sqrt()
            columns["prev_output"] = direction * noise_output
        return columns

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
        want_prediction: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The sample at the next timestep of the schedule.

        Args:
            model_output, sample: `[B, ...]`.
            timestep: one of `timesteps`.
            eta: 0 is deterministic; above 0 noise is added.
            use_clipped_model_output: take the noise e from the clipped data instead of the model.
            generator: draws the noise as in diffusers; or one generator a sample.
            variance_noise: the noise itself.
            return_dict: a DDIMSchedulerOutput, else `(prev_sample, pred_original_sample)`.
            seed, sample_ids: key the noise by sample and step instead, `vqkernels.normal_noise`
                with stream 1 and step = row of the schedule; it is drawn inside the step.
            uncond_output, guidance_scale, guidance_rescale: classifier-free guidance in the same
                pass, `model_output` being the conditional one; numbers, or one value a sample.
                arXiv:2207.12598, arXiv:2305.08891.
            want_prediction: False leaves out `pred_original_sample`, one tensor less to write.

        Raises:
            ValueError: no `set_timesteps` before, a timestep outside of the schedule, an `eta`
                that does not fit, more than one source of noise.
        """
        if not eta >= 0:
            raise ValueError(f"eta must be at least 0, got {eta}")
        self._check_exact(uncond_output=uncond_output)
        row = self._row(timestep)
        noise = {}
        if eta > 0:
            noise = self._noise(
                model_output,
                row,
                noise=variance_noise,
                generator=generator,
                seed=seed,
                sample_ids=sample_ids,
            )
        data: Tensor | None
        if self.numerics == "diffusers":
            previous, data = self._step_as_diffusers(
                model_output, row, sample, eta, use_clipped_model_output, noise.get("noise")
            )
        else:
            self._tabulate(eta=eta, use_clipped_model_output=use_clipped_model_output)
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
        return DDIMSchedulerOutput(previous, data) if return_dict else (previous, data)

    def _step_as_diffusers(
        self,
        model_output: Tensor,
        row: int,
        sample: Tensor,
        eta: float,
        use_clipped_model_output: bool,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        before = self._previous(row)
        a = self.alphas_cumprod[int(self._values[row])]
        a_prev = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        data = self._clipped_as_diffusers(self._data_as_diffusers(model_output, sample, a))
        std = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
        if use_clipped_model_output:
            direction = (sample - a**0.5 * data) / (1 - a) ** 0.5
        else:
            direction = self._noise_as_diffusers(model_output, sample, a)
        previous = a_prev**0.5 * data + (1 - a_prev - std**2) ** 0.5 * direction
        if noise is not None:
            previous = previous + std * noise
        return previous, data
