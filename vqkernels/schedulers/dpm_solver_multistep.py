"""DPM-Solver and DPM-Solver++, multistep, as ODE and SDE solvers.

Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice
from vqkernels.schedulers._beta_scheduler import TrainedBetas
from vqkernels.schedulers._config import configured
from vqkernels.schedulers._karras import KARRAS_SCHEDULERS
from vqkernels.schedulers._multistep import MultistepScheduler, check_custom
from vqkernels.schedulers._multistep_as_diffusers import (
    differences,
    dpm_solver_weights,
    weighted,
)
from vqkernels.schedulers._multistep_rows import dpm_solver, usable_order
from vqkernels.schedulers._noise import Generators
from vqkernels.schedulers._scheduler import SchedulerOutput
from vqkernels.schedulers._sigmas import Levels, shift_sigmas, variance_exploding_sigmas
from vqkernels.schedulers._spacing import check_custom_timesteps

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
SOLVERS = ("midpoint", "heun")
_FEW_STEPS = 15  # below which `lower_order_final` counts


class DPMSolverMultistepScheduler(MultistepScheduler):
    """A solver of order 1 to 3 in log(alpha / sigma), with the predictions of earlier steps.

    "dpmsolver++" extrapolates the predicted data, "dpmsolver" the predicted noise; "sde-" solves
    the reverse SDE and adds noise at each step. Equations: docs/schedulers.md.

    Args:
        num_train_timesteps .. time_shift_type: as in diffusers; docs/schedulers.md lists them.
        numerics: "exact", or "diffusers" for its order of operations and roundings.
        compat: names of faults of diffusers to reproduce; by default none under "exact", all
            under "diffusers".

    Raises:
        ValueError: an argument that does not fit.
    """

    _compatibles = KARRAS_SCHEDULERS
    _respacers = (*MultistepScheduler._respacers, "use_lu_lambdas")

    @configured
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: TrainedBetas = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        if algorithm_type == "deis":
            self._rename(algorithm_type="dpmsolver++")
        if solver_type in ("logrho", "bh1", "bh2"):
            self._rename(solver_type="midpoint")
        config = self.config
        check_choice("algorithm_type", config.algorithm_type, ALGORITHMS)
        check_choice("solver_type", config.solver_type, SOLVERS)
        check_choice("time_shift_type", time_shift_type, ("exponential",))
        if variance_type not in (None, "learned", "learned_range"):
            raise ValueError(
                f"variance_type must be None, 'learned' or 'learned_range', got {variance_type!r}"
            )
        self._data = config.algorithm_type.endswith("++")
        self._stochastic = config.algorithm_type.startswith("sde")
        if not self._data and final_sigmas_type == "zero":
            raise ValueError(
                f"final_sigmas_type must be 'sigma_min' with algorithm_type={algorithm_type!r}, "
                "which divides by it, got 'zero'"
            )
        if not self._data and prediction_type == "flow_prediction":
            raise ValueError(
                "prediction_type must be 'epsilon', 'sample' or 'v_prediction' with "
                f"algorithm_type={algorithm_type!r}, got 'flow_prediction'"
            )
        if config.algorithm_type == "sde-dpmsolver" and solver_order == 3:
            raise ValueError(
                "solver_order must be 1 or 2 with algorithm_type='sde-dpmsolver', got 3"
            )
        if use_flow_sigmas:
            check_custom("use_flow_sigmas", self._respacers, config)
        self._set_up()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Lay out the timesteps of `num_inference_steps` model calls, or the given ones.

        Args:
            num_inference_steps: the number of model calls.
            device: of the timesteps and the table.
            mu: the logarithm of this schedule's flow_shift; goes with use_dynamic_shifting.
            timesteps: descending training timesteps, in place of a number.

        Raises:
            ValueError: neither or both of number and timesteps, or ones that do not fit.
        """
        config = self.config
        if (num_inference_steps is None) == (timesteps is None):
            given = "neither" if timesteps is None else "both"
            raise ValueError(f"give num_inference_steps or timesteps, got {given}")
        if mu is not None and not config.use_dynamic_shifting:
            raise ValueError("mu goes with use_dynamic_shifting=True, got False")
        count = config.num_train_timesteps
        if timesteps is not None:
            check_custom("timesteps", (*self._respacers, "use_flow_sigmas"), config)
            places: Levels = check_custom_timesteps(timesteps, count)
            num_inference_steps = len(places)
        else:
            assert num_inference_steps is not None
            places = self._spaced_of(num_inference_steps, self._last_timestep())

        if config.use_flow_sigmas:
            shift = config.flow_shift if mu is None else float(np.exp(mu))
            times = 1.0 - np.linspace(1, 1 / count, num_inference_steps + 1)
            exact = single = shift_sigmas(times, shift)[:0:-1].copy()
            places = single * count
        else:
            exact, single = self._trained_levels(places, num_inference_steps)
            if any(config[name] for name in self._respacers):
                places = self._timesteps_of(single)
                rounds = config.use_karras_sigmas or config.use_lu_lambdas
                if rounds and config.beta_schedule != "squaredcos_cap_v2":
                    places = places.round()
        exact = np.append(exact, self._final(self._alphas_cumprod))
        single = np.append(single, self._final(self._single))
        if self._stochastic and exact[-1] > exact[-2] * (1 + 1e-12):
            raise ValueError(
                f"algorithm_type={config.algorithm_type!r} needs noise levels that descend, "
                f"got {exact[-2]:g} before the last, {exact[-1]:g}"
            )
        self._finish(exact, single, places, device)

    def _last_timestep(self) -> int:
        """Past the timestep whose log(alpha / sigma) is at least `lambda_min_clipped`."""
        kept = self._single
        lambdas = torch.log(torch.sqrt(kept)) - torch.log(torch.sqrt(1 - kept))
        below = torch.searchsorted(lambdas.flip(0), self.config.lambda_min_clipped)
        return self.config.num_train_timesteps - int(below)

    def _final(self, alphas_cumprod: Tensor) -> float:
        if self.config.final_sigmas_type == "zero":
            return 0.0
        kept = alphas_cumprod[0]
        return float(((1 - kept) / kept) ** 0.5)

    def _respaced(self, alphas_cumprod: Tensor, steps: int) -> Levels:
        if self.config.use_karras_sigmas or not self.config.use_lu_lambdas:  # in diffusers' order
            return super()._respaced(alphas_cumprod, steps)
        logs = np.log(variance_exploding_sigmas(alphas_cumprod))
        low, high = logs[0].item(), logs[-1].item()
        levels: Levels = np.exp(high + np.linspace(0, 1, steps) * (low - high))
        return levels

    # Rows.

    def _order(self, row: int, known: int) -> int:
        """The order of a step that has `known` earlier predictions."""
        config, count = self.config, len(self._values)
        few = config.lower_order_final and count < _FEW_STEPS
        last = row == count - 1
        if last and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            return 1
        most = 2 if few and row == count - 2 else 3
        return min(config.solver_order, known + 1, most)

    def _columns(self, *, begin: int = 0, **options: Any) -> dict[str, Tensor | float]:
        config, path = self.config, self._path
        sign = -1.0 if "third_order_sde" in self.compat else 1.0
        weights = torch.zeros(5, len(self._values), dtype=torch.float64)
        for row in range(len(self._values)):
            order = usable_order(path, row, self._order(row, max(row - begin, 0)))
            step = dpm_solver(
                path, row, order, config.algorithm_type, config.solver_type, sde_sign=sign
            )
            values = [step.sample, step.noise, *step.predictions]
            weights[: len(values), row] = torch.tensor(values, dtype=torch.float64)
        kept, noise, newest, *older = weights
        columns: dict[str, Tensor | float] = {"prev_noise": noise, "clip": self._clip()}
        columns |= {f"prev_history_{k}": weight for k, weight in enumerate(older)}
        data = self._data or self._threshold == "dynamic"
        of_sample, of_output = self._to_prediction(data)
        columns |= {"prediction_sample": of_sample, "prediction_output": of_output}
        if data and not self._data:
            # The threshold is on the data x, and the solver takes the noise (sample - alpha x) /
            # sigma: `extra` keeps it for later steps.
            alpha, sigma = (torch.tensor(w[:-1], dtype=torch.float64) for w in path[:2])
            columns |= {"extra_sample": 1 / sigma, "extra_prediction": -alpha / sigma}
            columns |= {"prev_sample": kept + newest / sigma}
            columns |= {"prev_prediction": -newest * alpha / sigma}
        else:
            columns |= self._with_prediction("prev", data, kept, newest)
        return columns

    # A step.

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the next timestep of the schedule.

        Args:
            model_output: `[B, ...]`; with twice sample's channels where the model says its
                variance, which is not used.
            timestep: one of `timesteps`; looked up at the first step of a loop only.
            sample: `[B, ...]`.
            generator: draws the noise of an SDE as in diffusers; or one generator a sample.
            variance_noise: that noise itself.
            return_dict: a SchedulerOutput, else `(prev_sample,)`.
            seed, sample_ids: key the noise by sample and step instead, `vqkernels.normal_noise`
                with stream 1 and step = row of the schedule; it is drawn inside the step.
            uncond_output, guidance_scale, guidance_rescale: classifier-free guidance in the same
                pass, `model_output` being the conditional one; numbers, or one value a sample.
                arXiv:2207.12598, arXiv:2305.08891.

        Raises:
            ValueError: no `set_timesteps` before, a timestep outside of the schedule, a step after
                the last, more than one source of noise.
        """
        self._check_exact(uncond_output=uncond_output)
        row = self._next_row(timestep)
        noise: dict[str, Any] = {}
        if self._stochastic:
            noise = self._noise(
                sample,
                row,
                noise=variance_noise,
                generator=generator,
                seed=seed,
                sample_ids=sample_ids,
                dtype=torch.float32,
            )
        if self.numerics == "diffusers":
            previous = self._step_as_diffusers(model_output, row, sample, noise.get("noise"))
        else:
            previous, _ = self._advance(
                sample,
                model_output,
                row,
                uncond_output=uncond_output,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                want_prediction=False,
                **noise,
            )
        self._step_index = row + 1
        return SchedulerOutput(previous) if return_dict else (previous,)

    def _advance(
        self,
        sample: Tensor,
        model_output: Tensor,
        index: int | Tensor,
        *,
        want_prediction: bool = True,
        **operands: Any,
    ) -> tuple[Tensor, Tensor | None]:
        row = self._row_of(index)
        if self._taken == 0:
            self._start(row)
        if operands.get("uncond_output") is not None:
            operands["uncond_output"] = self._mean(operands["uncond_output"], sample)
        keeps = self.config.solver_order > 1
        thresholded_noise = self._threshold == "dynamic" and not self._data
        result = self._denoise(
            sample,
            self._mean(model_output, sample),
            index,
            history=self._earlier()[: self.config.solver_order - 1],
            want_prediction=want_prediction or (keeps and not thresholded_noise),
            want_extra=keeps and thresholded_noise,
            **operands,
        )
        self._remember(result.extra if thresholded_noise else result.prediction)
        return result.prev_sample, result.prediction

    def _mean(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """Without the channels of a learned variance."""
        if self.config.variance_type is None or self.config.prediction_type != "epsilon":
            return model_output
        channels = 3 if "three_channels" in self.compat else sample.shape[1]
        return model_output[:, :channels]

    def _step_as_diffusers(
        self, model_output: Tensor, row: int, sample: Tensor, noise: Tensor | None
    ) -> Tensor:
        if self._taken == 0:
            self._start(row)
        prediction = self._prediction_as_diffusers(self._mean(model_output, sample), row, sample)
        known = self.lower_order_nums
        self._remember(prediction)
        order = self._order(row, known)
        if noise is not None:
            noise = noise.to(sample.device, torch.float32)
        around = self._around(row + 1, order + 1)
        config, sign = self.config, -1.0 if "third_order_sde" in self.compat else 1.0
        weights = dpm_solver_weights(config.algorithm_type, config.solver_type, order, around, sign)
        terms = differences(around, self._earlier(), order)
        noises = [] if noise is None else [noise]
        previous = weighted(weights, [sample.to(torch.float32), *terms, *noises])
        return previous.to(prediction.dtype)

    def _prediction_as_diffusers(self, output: Tensor, row: int, sample: Tensor) -> Tensor:
        kind = self.config.prediction_type
        alpha, sigma = self._split(self.sigmas[row])
        if self._data:
            if kind == "epsilon":
                data = (sample - sigma * output) / alpha
            elif kind == "sample":
                data = output
            elif kind == "v_prediction":
                data = alpha * sample - sigma * output
            else:
                data = sample - self.sigmas[row] * output
            return self._clipped_as_diffusers(data)
        if kind == "epsilon":
            noise = output
        elif kind == "sample":
            noise = (sample - alpha * output) / sigma
        else:
            noise = alpha * output + sigma * sample
        if self._threshold == "dynamic":
            data = self._clipped_as_diffusers((sample - sigma * noise) / alpha)
            noise = (sample - alpha * data) / sigma
        return noise
