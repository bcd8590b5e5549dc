"""Euler steps for models of EDM. Karras et al. 2022, arXiv:2206.00364, algorithm 2 and table 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice
from vqkernels.schedulers._config import configured
from vqkernels.schedulers._noise import Generators
from vqkernels.schedulers._scheduler import PredictionOutput
from vqkernels.schedulers._sigma_scheduler import AdditiveScheduler
from vqkernels.schedulers._sigmas import Levels, given_levels, karras_sigmas
from vqkernels.schedulers._spacing import check_steps


@dataclass
class EDMEulerSchedulerOutput(PredictionOutput):
    pass


class EDMEulerScheduler(AdditiveScheduler):
    """Deterministic sampling, or stochastic with `s_churn > 0`, of a preconditioned model.

    With s = sigma at a step, s' at the next one and d = sigma_data:

        x0 = d^2 / (s^2 + d^2) sample +- s d / sqrt(s^2 + d^2) model_output     (- : v_prediction)
        prev_sample = sample + (s' - s) (sample - x0) / s

    Args:
        sigma_min .. final_sigmas_type: as in diffusers; docs/schedulers.md lists them.
        numerics: "exact", or "diffusers" for its order of operations and roundings.
        compat: names of faults of diffusers to reproduce; by default none under "exact", all
            under "diffusers".

    Raises:
        ValueError: an argument that does not fit.
    """

    @configured
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        check_choice("sigma_schedule", sigma_schedule, ("karras", "exponential"))
        check_choice("prediction_type", prediction_type, ("epsilon", "v_prediction"))
        check_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        if not 0 < sigma_min <= sigma_max < math.inf:
            raise ValueError(
                f"sigma_min must be positive and at most sigma_max, got {sigma_min} and {sigma_max}"
            )
        self.init_noise_sigma = (sigma_max**2 + 1) ** 0.5
        ramp = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        self._set_levels(self._spaced_sigmas(ramp))
        self.timesteps = self._times()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Lay out so many model calls, or one at each of these levels.

        Args:
            num_inference_steps: the number of model calls; None with `sigmas`.
            sigmas: positive levels, descending; the end of the last step follows them.

        Raises:
            ValueError: a number of steps outside of [1, num_train_timesteps] or not that of
                `sigmas`; levels that do not fit.
        """
        if sigmas is None:
            steps = check_steps(num_inference_steps, self.config.num_train_timesteps)
            levels = self._spaced_sigmas(torch.linspace(0, 1, steps, dtype=torch.float64))
        elif "edm_sigmas" in self.compat:
            levels = self._spaced_sigmas(torch.as_tensor(sigmas, dtype=torch.float64))
        else:
            levels = given_levels("sigmas", sigmas)
            if levels[-1] == 0:
                raise ValueError(f"sigmas must be positive, got {levels.tolist()}")
        if num_inference_steps is not None and num_inference_steps != len(levels):
            raise ValueError(
                f"num_inference_steps must be None or that of sigmas, {len(levels)}, "
                f"got {num_inference_steps}"
            )
        self.num_inference_steps = len(levels)
        self._set_levels(levels)
        self._lay_out(self._times(), device)

    def _spaced_sigmas(self, ramp: Tensor) -> Levels:
        config = self.config
        if config.sigma_schedule == "karras":
            return karras_sigmas(ramp, config.sigma_min, config.sigma_max, config.rho).numpy()
        # diffusers leaves this one in float32 from the first
        dtype = torch.float32 if self.numerics == "diffusers" else torch.float64
        low, high = math.log(config.sigma_min), math.log(config.sigma_max)
        return torch.linspace(low, high, len(ramp), dtype=dtype).exp().flip(0).numpy()

    def _set_levels(self, levels: Levels) -> None:
        levels = levels.astype(self._precision)
        final = levels[-1] if self.config.final_sigmas_type == "sigma_min" else 0.0
        self._set_sigmas(np.append(levels, final))

    def _times(self) -> Tensor:
        sigmas = self.sigmas if self.numerics == "diffusers" else self._sigmas
        return self.precondition_noise(sigmas[:-1]).float()

    def precondition_inputs(self, sample: Tensor, sigma: float | Tensor) -> Tensor:
        """sample / sqrt(sigma^2 + sigma_data^2), what the model sees."""
        return sample * (1 / (sigma**2 + self.config.sigma_data**2) ** 0.5)

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """log(sigma) / 4, the model's condition."""
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor([sigma])
        return 0.25 * torch.log(sigma)

    def precondition_outputs(
        self, sample: Tensor, model_output: Tensor, sigma: float | Tensor
    ) -> Tensor:
        """The data x0 that the model's output tells at this level."""
        data = self.config.sigma_data
        kept = data**2 / (sigma**2 + data**2)
        signed = -sigma if self.config.prediction_type == "v_prediction" else sigma
        return kept * sample + signed * data / (sigma**2 + data**2) ** 0.5 * model_output

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The model's input: `precondition_inputs` at the step's level."""
        row = self._next_row(timestep)
        exact = self.numerics == "exact"
        return self.precondition_inputs(sample, self._host[row] if exact else self.sigmas[row])

    def _columns(self, **churn: float) -> dict[str, Tensor | float]:
        _, raised, following = self._levels_of_rows(**churn)
        data = self.config.sigma_data
        sign = -1 if self.config.prediction_type == "v_prediction" else 1
        energy = raised**2 + data**2
        change = following - raised
        return {
            "prediction_sample": data**2 / energy,
            "prediction_output": sign * raised * data / energy.sqrt(),
            "prev_sample": 1 + change * raised / energy,
            "prev_output": -change * sign * data / energy.sqrt(),
        }

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
        want_prediction: bool = True,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The sample at the next level.

        Args:
            model_output, sample: `[B, ...]`.
            timestep: one of `timesteps`, not its number. It tells the first step of a loop; later
                ones follow in order.
            s_churn, s_tmin, s_tmax, s_noise: raise the levels inside of [s_tmin, s_tmax] by
                min(s_churn / steps, sqrt(2) - 1) of themselves, with noise s_noise as strong as
                that asks for, before the step.
            generator: draws the noise as in diffusers; or one generator a sample.
            return_dict: an EDMEulerSchedulerOutput, else `(prev_sample, pred_original_sample)`.
            pred_original_sample: the data x0, where it is known already; then `model_output` is
                not used.
            seed, sample_ids: key the noise by sample and step instead, `vqkernels.normal_noise`
                with stream 1 and step = row of the schedule.
            uncond_output, guidance_scale, guidance_rescale: classifier-free guidance in the same
                pass, `model_output` being the conditional one; numbers, or one value a sample.
                arXiv:2207.12598, arXiv:2305.08891.
            want_prediction: False leaves out `pred_original_sample`, one tensor less to write.

        Raises:
            ValueError: no `set_timesteps` before, an integer timestep or one outside of the
                schedule, a negative `s_churn`, both `generator` and `seed`, guidance of a given
                `pred_original_sample`.
        """
        self._check_timestep(timestep)
        self._check_exact(uncond_output=uncond_output)
        if pred_original_sample is not None and uncond_output is not None:
            raise ValueError("uncond_output must be None where pred_original_sample is given")
        row = self._next_row(timestep)
        if self.numerics == "diffusers":
            sample = sample.to(torch.float32)
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax}
        sample, gamma = self._churned(
            sample, model_output, row, s_noise, generator, seed, sample_ids, **churn
        )
        data = pred_original_sample
        if self.numerics == "diffusers":
            raised = self.sigmas[row] * (gamma + 1)
            if data is None:
                data = self.precondition_outputs(sample, model_output, raised)
            slope = (sample - data) / raised
            previous = (sample + slope * (self.sigmas[row + 1] - raised)).to(model_output.dtype)
        elif data is not None:
            share = self._host[row + 1] / (self._host[row] * (1 + gamma))
            previous = torch.lerp(data.to(sample.dtype), sample, share)
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
        return EDMEulerSchedulerOutput(previous, data) if return_dict else (previous, data)
