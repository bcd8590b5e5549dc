"""Euler steps of the probability flow ODE. Karras et al. 2022, arXiv:2206.00364, algorithm 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice
from vqkernels.ops.diffuse import diffuse
from vqkernels.schedulers._beta_scheduler import TrainedBetas
from vqkernels.schedulers._config import configured
from vqkernels.schedulers._exploding import ExplodingScheduler
from vqkernels.schedulers._karras import KARRAS_SCHEDULERS
from vqkernels.schedulers._noise import Generators
from vqkernels.schedulers._prediction import DISCRETE_PREDICTIONS
from vqkernels.schedulers._scheduler import PredictionOutput
from vqkernels.schedulers._sigma_scheduler import per_sample
from vqkernels.schedulers._sigmas import Levels, given_levels


@dataclass
class EulerDiscreteSchedulerOutput(PredictionOutput):
    pass


class EulerDiscreteScheduler(ExplodingScheduler):
    """Deterministic sampling, or stochastic with `s_churn > 0`.

    With s = sigma at a step, s' at the next one and the data x0 as predicted:

        prev_sample = sample + (s' - s) (sample - x0) / s

    Args:
        num_train_timesteps .. final_sigmas_type: as in diffusers; docs/schedulers.md lists them.
        numerics: "exact", or "diffusers" for its order of operations and roundings.
        compat: names of faults of diffusers to reproduce; by default none under "exact", all
            under "diffusers".

    Raises:
        ImportError: `use_beta_sigmas` without scipy.
        ValueError: an argument that does not fit.
    """

    _compatibles = KARRAS_SCHEDULERS
    _predictions = (*DISCRETE_PREDICTIONS, "original_sample")  # the last is "sample"

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: TrainedBetas = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        check_choice("interpolation_type", interpolation_type, ("linear", "log_linear"))
        check_choice("timestep_type", timestep_type, ("discrete", "continuous"))
        check_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        self._set_exploding()
        self._continuous = timestep_type == "continuous" and prediction_type == "v_prediction"
        levels = np.append(self._trained[::-1], 0.0)
        self._set_sigmas(levels)
        times = np.arange(num_train_timesteps, dtype=np.float32)[::-1].copy()
        self.timesteps = torch.from_numpy(self._continuous_times() if self._continuous else times)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Lay out the model calls: so many, or at these timesteps, or at these levels.

        Args:
            num_inference_steps: the number of model calls.
            timesteps: in [0, num_train_timesteps - 1], descending.
            sigmas: descending, and one more for the end of the last step.

        Raises:
            ValueError: none or several of the three; values that do not fit; `timesteps` where
                the config spaces levels (`use_karras_sigmas`, ...) or timesteps are continuous.
        """
        given = {
            "num_inference_steps": num_inference_steps,
            "timesteps": timesteps,
            "sigmas": sigmas,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(f"give one of {', '.join(given)}, got {' and '.join(names) or 'none'}")
        if timesteps is not None and self._continuous:
            raise ValueError("timesteps must not be given with timestep_type='continuous'")
        if sigmas is not None:
            levels = self._given_sigmas(sigmas)
            times = self._times_of(levels[:-1])
            steps = len(times)
        else:
            if timesteps is not None:
                times = self._given_times(timesteps)
                steps = len(times)
            else:
                assert num_inference_steps is not None
                steps = num_inference_steps
                times = self._spaced_times(steps, self.config.num_train_timesteps)
            self._check_times(times)
            levels = self._interpolated(times, steps)
            if self._respacing:
                levels, times = self._respaced(levels, steps)
            final = self._trained[0] if self.config.final_sigmas_type == "sigma_min" else 0.0
            levels = np.append(levels, final)
        self.num_inference_steps = steps
        self._set_sigmas(levels)
        if self._continuous:
            times = self._continuous_times()
        self._lay_out(torch.from_numpy(times.astype(np.float32)), device)

    def _interpolated(self, times: Levels, steps: int) -> Levels:
        if self.config.interpolation_type == "linear":
            return self._at_times(times)
        logs = np.log(self._trained)
        if "log_linear_levels" not in self.compat:
            levels: Levels = np.exp(np.interp(times, np.arange(len(logs)), logs))
            return levels
        dtype = torch.from_numpy(self._trained).dtype
        return torch.linspace(logs[-1], logs[0], steps + 1, dtype=dtype).exp().numpy()

    def _given_sigmas(self, sigmas: Sequence[float] | Tensor) -> Levels:
        levels = given_levels("sigmas", sigmas, self._precision)
        if len(levels) < 2 or levels[-2] == 0:
            raise ValueError(
                f"sigmas must hold positive levels and one more for the end, got {levels.tolist()}"
            )
        return levels

    def _continuous_times(self) -> Levels:
        """log(sigma) / 4, what models of arXiv:2206.00364 are conditioned on."""
        sigmas = self.sigmas if self.numerics == "diffusers" else self._sigmas
        times: Levels = (0.25 * sigmas[:-1].log()).float().numpy()
        return times

    def _columns(self, **churn: float) -> dict[str, Tensor | float]:
        sigma, raised, following = self._levels_of_rows(**churn)
        readings = self._readings(sigma, raised)
        change = following - raised
        return {
            "prediction_sample": readings.data_sample,
            "prediction_output": readings.data_output,
            "prev_sample": 1 + change * readings.slope_sample,
            "prev_output": change * readings.slope_output,
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
        *,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
        want_prediction: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The sample at the next level.

        Args:
            model_output, sample: `[B, ...]`.
            timestep: one of `timesteps`, not its number. It tells the first step of a loop; later
                ones follow in order.
            s_churn, s_tmin, s_tmax, s_noise: raise the levels inside of [s_tmin, s_tmax] by
                min(s_churn / steps, sqrt(2) - 1) of themselves, with noise s_noise as strong as
                that asks for, before the step.
            generator: draws the noise as in diffusers; or one generator a sample.
            return_dict: an EulerDiscreteSchedulerOutput, else
                `(prev_sample, pred_original_sample)`.
            seed, sample_ids: key the noise by sample and step instead, `vqkernels.normal_noise`
                with stream 1 and step = row of the schedule.
            uncond_output, guidance_scale, guidance_rescale: classifier-free guidance in the same
                pass, `model_output` being the conditional one; numbers, or one value a sample.
                arXiv:2207.12598, arXiv:2305.08891.
            want_prediction: False leaves out `pred_original_sample`, one tensor less to write.

        Raises:
            ValueError: no `set_timesteps` before, an integer timestep or one outside of the
                schedule, a negative `s_churn`, both `generator` and `seed`.
        """
        self._check_timestep(timestep)
        self._check_exact(uncond_output=uncond_output)
        row = self._next_row(timestep)
        if self.numerics == "diffusers":
            sample = sample.to(torch.float32)
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax}
        sample, gamma = self._churned(
            sample, model_output, row, s_noise, generator, seed, sample_ids, **churn
        )
        if self.numerics == "diffusers":
            sigma = self.sigmas[row]
            raised = sigma * (gamma + 1)
            known = self._exploded_data_as_diffusers(sample, model_output, sigma, raised)
            slope = (sample - known) / raised
            previous = (sample + slope * (self.sigmas[row + 1] - raised)).to(model_output.dtype)
            data: Tensor | None = known
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
        return EulerDiscreteSchedulerOutput(previous, data) if return_dict else (previous, data)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha(t) noise - sqrt(1 - alpha(t)^2) sample, alpha = 1 / sqrt(sigma(t)^2 + 1).

        Arguments and errors are those of `add_noise`.
        """
        self._check_timestep(timesteps)
        rows = self._search(per_sample(timesteps, sample))
        if "velocity_index" in self.compat:
            kept = self.alphas_cumprod if self.numerics == "diffusers" else self._alphas_cumprod
        else:
            kept = 1 / (self._sigmas**2 + 1)
        if self._rounds_as_diffusers(sample):
            kept = kept.to(sample)[rows]
            kept = kept.reshape(kept.shape + (1,) * (sample.dim() - kept.dim()))
            return kept**0.5 * noise - (1 - kept) ** 0.5 * sample
        kept = kept.to(sample.device)[rows]
        return diffuse(sample, kept.sqrt(), (1 - kept).sqrt(), noise=noise, target="v")[1]
