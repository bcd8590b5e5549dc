"""Heun steps along a rectified flow. Liu et al. 2022, arXiv:2209.03003; Karras et al. 2022,
arXiv:2206.00364, algorithm 2 without its preconditioning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqkernels.schedulers._config import configured
from vqkernels.schedulers._flow import FlowScheduler
from vqkernels.schedulers._heun import HeunPairs, doubled
from vqkernels.schedulers._noise import Generators
from vqkernels.schedulers._scheduler import SchedulerOutput
from vqkernels.schedulers._sigmas import shift_sigmas


@dataclass
class FlowMatchHeunDiscreteSchedulerOutput(SchedulerOutput):
    pass


class FlowMatchHeunDiscreteScheduler(HeunPairs, FlowScheduler):
    """Sampling of second order, two model calls a level but for the last.

    With s = sigma at a level and s' at the next one:

        first call:   prev_sample = sample + (s' - s) model_output
        second call:  prev_sample = the first call's sample
                                    + (s' - s) (the first call's output + model_output) / 2

    Churn (`s_churn > 0`) raises s by noise before the first call's step, whose slope is then
    s / s_hat of the output.

    Args:
        num_train_timesteps, shift: as in diffusers.
        numerics: "exact", or "diffusers" for its order of operations and roundings.
        compat: names of faults of diffusers to reproduce; by default none under "exact", all
            under "diffusers".

    Raises:
        ValueError: an argument that does not fit.
    """

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        self._set_flow(shift)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Lay out the model calls at `num_inference_steps` = n levels: 2 n - 1.

        Raises:
            ValueError: a number outside of [1, num_train_timesteps].
        """
        train = self.config.num_train_timesteps
        even = self._even_times(num_inference_steps) / train
        levels = torch.from_numpy(shift_sigmas(even, self.config.shift)).to(self._dtype)
        self.num_inference_steps = num_inference_steps
        self._first = None
        self._set_sigmas(np.append(doubled(levels.numpy()), np.zeros(1, levels.numpy().dtype)))
        self.sigmas = self.sigmas.to(device)
        times = torch.from_numpy(doubled((levels * train).numpy()))
        self._lay_out(times.float(), device)

    def _level_row(self, row: int) -> int:
        return row - row % 2  # both calls churn as the first one's level asks for

    def _columns(self, **churn: float) -> dict[str, Tensor | float]:
        sigma, raised, _ = self._levels_of_rows(**churn)
        slope = torch.where(torch.arange(len(sigma)) % 2 == 0, sigma / raised, 1.0)
        return {
            "prediction_sample": 1.0,
            "prediction_output": -sigma,
            **self._pairs(self._changes(raised), output=slope),
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
    ) -> FlowMatchHeunDiscreteSchedulerOutput | tuple[Tensor]:
        """The sample at the next level as the first or the second call of a level has it.

        Args:
            model_output, sample: `[B, ...]`; a first call's sample is kept, not copied, for the
                second one.
            timestep: one of `timesteps`, not its number. It tells the first step of a loop; later
                ones follow in order.
            s_churn, s_tmin, s_tmax, s_noise: raise the levels inside of [s_tmin, s_tmax] by
                min(s_churn / steps, sqrt(2) - 1) of themselves, with noise s_noise as strong as
                that asks for, before the step.
            generator: draws the noise as in diffusers; or one generator a sample.
            return_dict: a FlowMatchHeunDiscreteSchedulerOutput, else `(prev_sample,)`.
            seed, sample_ids: key the noise by sample and step instead, `vqkernels.normal_noise`
                with stream 1 and step = row of the schedule.
            uncond_output, guidance_scale, guidance_rescale: classifier-free guidance in the same
                pass, `model_output` being the conditional one; numbers, or one value a sample.
                arXiv:2207.12598, arXiv:2305.08891.

        Raises:
            ValueError: no `set_timesteps` before, an integer timestep or one outside of the
                schedule, a loop that begins at a second call, a negative `s_churn`, both
                `generator` and `seed`.
        """
        self._check_timestep(timestep)
        self._check_exact(uncond_output=uncond_output)
        row = self._next_row(timestep)
        if self.numerics == "diffusers":
            sample = sample.to(torch.float32)
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax}
        # A second call's noise has no effect but the roundings and the generator's next numbers.
        sample, gamma = self._churned(
            sample, model_output, row, s_noise, generator, seed, sample_ids, **churn
        )
        if self.numerics == "diffusers":
            previous = self._step_as_diffusers(model_output, row, sample, gamma)
        else:
            previous, _ = self._advance(
                sample,
                model_output,
                row,
                uncond_output=uncond_output,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                want_prediction=False,
            )
        self._step_index = row + 1
        return FlowMatchHeunDiscreteSchedulerOutput(previous) if return_dict else (previous,)

    def _step_as_diffusers(
        self, model_output: Tensor, row: int, sample: Tensor, gamma: float
    ) -> Tensor:
        first = self._taken(row)
        sigma = self.sigmas[row]
        data = sample - model_output * sigma
        if first is None:
            raised = sigma * (gamma + 1)
            slope = (sample - data) / raised
            self._first = sample, slope
            change = self.sigmas[row + 1] - raised
        else:
            sample_then, slope_then = first
            slope = 0.5 * (slope_then + (sample - data) / sigma)
            change = sigma - self.sigmas[row - 1] * (gamma + 1)
            sample = sample_then
        return (sample + slope * change).to(model_output.dtype)
