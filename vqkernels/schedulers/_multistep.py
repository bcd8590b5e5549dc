"""What DPM-Solver and UniPC share: their schedules, noising, and predictions kept between steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice, check_floating
from vqkernels.schedulers._beta_scheduler import BetaScheduler
from vqkernels.schedulers._betas import make_betas
from vqkernels.schedulers._config import Config
from vqkernels.schedulers._multistep_as_diffusers import Around
from vqkernels.schedulers._multistep_rows import Path
from vqkernels.schedulers._prediction import DISCRETE_PREDICTIONS, data_weights, noise_weights
from vqkernels.schedulers._sigmas import (
    Levels,
    respaced_like,
    respacing_of,
    sigma_to_t,
    variance_exploding_sigmas,
)
from vqkernels.schedulers._spacing import check_steps

# What diffusers puts for alphas_cumprod = 0: sigma stays finite, 2^12.
_LEAST_SIGNAL = 2.0**-24
FINAL_SIGMAS = ("zero", "sigma_min")


class MultistepScheduler(BetaScheduler):
    """A subclass lays out its levels (`_respaced`, `_finish`) and fills `_columns`.

    The table depends on the row that a loop starts from: there is no earlier prediction there.
    `sigmas` is float32 `[steps + 1]` as in diffusers; rows come from the float64 `_path`.
    """

    _respacers: tuple[str, ...] = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    _predictions = (*DISCRETE_PREDICTIONS, "flow_prediction")
    _remembered: ClassVar[tuple[str, ...]] = (
        "model_outputs",
        "lower_order_nums",
        "_taken",
        "_begin",
    )
    _defaults: ClassVar[dict[str, Any]] = {"begin": 0}
    model_outputs: list[Tensor | None]  # converted predictions, the newest last
    lower_order_nums: int
    _taken: int  # steps since the loop began
    sigmas: Tensor
    _single: Tensor  # alphas_cumprod in diffusers' float32 arithmetic: it decides on timesteps
    _path: Path
    _schedule_levels: Tensor | None = None  # [2, steps + 1] float32: alpha and sigma
    _begin = 0

    def _set_up(self) -> None:
        """From the config; the subclass has checked what is its own."""
        config = self.config
        if config.solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, got {config.solver_order!r}")
        check_choice("final_sigmas_type", config.final_sigmas_type, FINAL_SIGMAS)
        check_choice(
            "timestep_spacing", config.timestep_spacing, ("linspace", "leading", "trailing")
        )
        respacing_of(config)
        self._set_betas()
        single = make_betas(
            config.beta_schedule,
            config.num_train_timesteps,
            config.beta_start,
            config.beta_end,
            trained=config.trained_betas,
            zero_snr=config.rescale_betas_zero_snr,
            dtype=torch.float32,
        )
        self._single = torch.cumprod(1.0 - single, dim=0)
        if config.rescale_betas_zero_snr:
            for kept in (self._alphas_cumprod, self.alphas_cumprod, self._single):
                kept[-1] = _LEAST_SIGNAL
            self._levels = torch.stack([self._alphas_cumprod, 1 - self._alphas_cumprod])
            self._levels = self._levels.sqrt().float()
        kept = self.alphas_cumprod
        self.alpha_t, self.sigma_t = kept.sqrt(), (1 - kept).sqrt()
        self.lambda_t = self.alpha_t.log() - self.sigma_t.log()
        self.sigmas = ((1 - kept) / kept) ** 0.5
        if config.thresholding:
            self._threshold, self._ratio = "dynamic", config.dynamic_thresholding_ratio
        count = config.num_train_timesteps
        self.timesteps = torch.arange(count - 1, -1, -1, dtype=torch.float32)
        self._forget()

    def _clip(self) -> float:
        return float(self.config.sample_max_value) if self._threshold == "dynamic" else math.inf

    def _rename(self, **entries: Any) -> None:
        """Note that an entry of another class's config means this in ours."""
        self._internal_dict = Config({**self.config, **entries})

    # The schedule.

    def _spaced_of(self, num_inference_steps: int, last_timestep: int) -> Levels:
        """Descending int64 timesteps below `last_timestep`; the lowest level is left to the end."""
        config = self.config
        steps = check_steps(num_inference_steps, config.num_train_timesteps)
        if config.timestep_spacing == "linspace":
            points = np.linspace(0, last_timestep - 1, steps + 1)
            timesteps = points.round()[:0:-1].astype(np.int64)
        elif config.timestep_spacing == "leading":
            ratio = last_timestep // (steps + 1)
            if ratio == 0:
                raise ValueError(
                    f"num_inference_steps must be below {last_timestep} with timestep_spacing="
                    f"'leading', got {steps}"
                )
            timesteps = np.arange(steps, 0, -1) * ratio + config.steps_offset
        else:
            counted = np.arange(last_timestep, 0, -config.num_train_timesteps / steps)
            if "trailing_extra_timestep" not in self.compat:
                counted = counted[:steps]
            timesteps = counted.round().astype(np.int64) - 1
        if timesteps[0] >= config.num_train_timesteps:
            raise ValueError(
                f"steps_offset must leave timesteps below num_train_timesteps = "
                f"{config.num_train_timesteps}, got {config.steps_offset}, which gives the "
                f"timestep {timesteps[0]}"
            )
        return timesteps

    def _trained_levels(self, places: Levels, steps: int) -> tuple[Levels, Levels]:
        """Respaced levels, or else those at timesteps: in float64, and in diffusers' arithmetic."""
        respaced = any(self.config.get(name) for name in self._respacers)

        def levels(alphas_cumprod: Tensor) -> Levels:
            if respaced:
                return self._respaced(alphas_cumprod, steps)
            trained = variance_exploding_sigmas(alphas_cumprod)
            return np.interp(places, np.arange(len(trained)), trained)

        return levels(self._alphas_cumprod), levels(self._single)

    def _respaced(self, alphas_cumprod: Tensor, steps: int) -> Levels:
        levels = variance_exploding_sigmas(alphas_cumprod)
        name = respacing_of(self.config)
        assert name is not None
        # sigma_min and sigma_max of another class's config count here too, as in diffusers.
        return respaced_like(self.config, name, levels[::-1], steps)

    def _timesteps_of(self, levels: Levels) -> Levels:
        return sigma_to_t(levels, np.log(variance_exploding_sigmas(self._single)))

    def _finish(
        self,
        exact: Levels,
        single: Levels,
        timesteps: Levels,
        device: torch.device | str | None,
    ) -> None:
        """Take up a schedule: levels `[steps + 1]` in float64, as diffusers has them, timesteps."""
        if self.numerics == "exact" and not np.isfinite(exact).all():
            raise ValueError(f"the schedule's noise levels must be finite, got {exact.tolist()}")
        if abs(exact[-1] - exact[-2]) <= 1e-12 * exact[-2]:
            exact[-1] = exact[-2]  # one level that was computed in two ways
        rounded = torch.from_numpy(single.astype(np.float32))
        as_diffusers = self.numerics == "diffusers"
        self.sigmas = rounded if as_diffusers else torch.from_numpy(exact).float()
        alpha, sigma = self._split(exact)
        self._path = Path.of(alpha, sigma)
        self._schedule_levels = torch.from_numpy(np.stack([alpha, sigma])).float()
        self.num_inference_steps = len(timesteps)
        self._forget()
        self._lay_out(torch.from_numpy(timesteps).to(torch.int64), device)

    def _split(self, sigma: Any) -> tuple[Any, Any]:
        """alpha and sigma of x = alpha x_0 + sigma z at levels, in their precision."""
        if self.config.use_flow_sigmas:
            return 1 - sigma, sigma
        alpha = 1 / ((sigma**2 + 1) ** 0.5)
        return alpha, sigma * alpha

    # Rows.

    def _to_prediction(self, data: bool) -> tuple[Tensor, Tensor]:
        """Weights of sample and output in the predicted data, or noise, at every row."""
        kind = self.config.prediction_type
        alpha, sigma = (torch.tensor(w[:-1], dtype=torch.float64) for w in self._path[:2])
        if kind == "flow_prediction" and not self.config.use_flow_sigmas:
            sigma = sigma / alpha
        return data_weights(kind, alpha, sigma) if data else noise_weights(kind, alpha, sigma)

    def _with_prediction(
        self, name: str, data: bool, sample: Tensor, prediction: Tensor
    ) -> dict[str, Tensor | float]:
        """Columns of `sample` x + `prediction` m, m being the predicted data, or noise.

        Without a threshold m is linear in sample and output, and written out: where they nearly
        cancel, at little signal, m itself has lost digits.
        """
        if self._threshold != "none":
            return {f"{name}_sample": sample, f"{name}_prediction": prediction}
        of_sample, of_output = self._to_prediction(data)
        return {
            f"{name}_sample": sample + prediction * of_sample,
            f"{name}_output": prediction * of_output,
        }

    # The place in the schedule.

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The row of a timestep.

        Of a repeated one the row of the element of `timesteps` that it is. A number, or a tensor
        from elsewhere, stands for the second; at the schedule's start for the first, or the loop
        would have a step too many.
        """
        self._check_laid_out()
        row = self._place(timestep) if isinstance(timestep, Tensor) else None
        if row is not None and "repeated_timesteps" not in self.compat:
            return row
        row = super().index_for_timestep(timestep)
        if row == 1 and self._values[0] == self._values[1]:
            return row if "repeated_timesteps" in self.compat else 0
        return row

    # A step.

    def _forget(self) -> None:
        self.model_outputs = [None] * self.config.solver_order
        self.lower_order_nums = self._taken = 0

    def _remember(self, prediction: Tensor | None) -> None:
        self.model_outputs = [*self.model_outputs[1:], prediction]
        self._taken += 1
        self.lower_order_nums = min(self._taken, self.config.solver_order)

    def _earlier(self) -> list[Tensor]:
        """The kept predictions, newest first."""
        return [kept for kept in self.model_outputs[::-1] if kept is not None]

    def _around(self, row: int, count: int) -> Around:
        """`count` levels from a row towards the noise."""
        pairs = [self._split(self.sigmas[row - k]) for k in range(count)]
        lambdas = [torch.log(alpha) - torch.log(sigma) for alpha, sigma in pairs]
        return Around([pair[0] for pair in pairs], [pair[1] for pair in pairs], lambdas)

    def _row_of(self, index: int | Tensor) -> int:
        """The row on the host: a tensor is not asked, steps follow one another."""
        if isinstance(index, int):
            return index
        return self._begin + self._taken if self._taken else self._begin_index or 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this row and count from there: steps then ask no device for a timestep."""
        super().set_begin_index(begin_index)
        if self.num_inference_steps is not None and self._taken == 0:
            self._start(begin_index)

    def _start(self, row: int) -> None:
        """A loop begins at this row, without predictions: build the table for it."""
        self._begin = row
        if self.numerics == "exact":
            self._tabulate(begin=row)

    # Noising.

    def _levels_at(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        check_floating("original_samples", sample)
        if self._schedule_levels is None:
            if self.config.use_flow_sigmas:
                raise ValueError("use_flow_sigmas needs set_timesteps before noise is added")
            return super()._levels_at(sample, timesteps)
        self._schedule_levels = self._schedule_levels.to(sample.device)
        rows = self._rows_at(sample, timesteps)
        alpha, sigma = self._schedule_levels[:, rows]
        return alpha, sigma

    def _levels_as_diffusers(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        if self._schedule_levels is None:
            self._check_timesteps(sample, timesteps)
            rows = timesteps.to("cpu").long()
            if "training_sigma_order" in self.compat:
                rows = self.config.num_train_timesteps - 1 - rows
        else:
            rows = self._rows_at(sample, timesteps)
        sigma = self.sigmas.to(sample.device, sample.dtype)[rows.to(sample.device)].flatten()
        alpha, sigma = self._split(sigma.reshape(-1, *(1,) * (sample.dim() - 1)))
        return alpha, sigma

    def _rows_at(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        """Rows of timesteps; where a pipeline set the place, all are at that place."""
        if timesteps.dim() == 0:
            timesteps = timesteps.expand(len(sample))
        if self._begin_index is not None:
            row = self._begin_index if self._step_index is None else self._step_index
            return torch.full_like(timesteps, row, dtype=torch.int64)
        schedule = self.timesteps.to(timesteps.device)
        rising = schedule.flip(0).contiguous()
        last = len(schedule) - 1
        first = len(schedule) - torch.searchsorted(
            rising, timesteps.contiguous().long(), right=True
        )
        first = first.clamp(max=last)
        if timesteps.device.type == "cpu" and not bool((schedule[first] == timesteps).all()):
            raise ValueError(
                f"timesteps must be of the schedule's {len(schedule)} ({self._ends()}), "
                f"got {timesteps.tolist()}"
            )
        again = (first + 1).clamp(max=last)  # of a repeated timestep, the second as in a step
        return torch.where(schedule[again] == timesteps, again, first)


def check_custom(name: str, others: Sequence[str], config: Config) -> None:
    """Levels or timesteps that a caller gives leave no room for a config that makes its own."""
    for other in others:
        if config.get(other):
            raise ValueError(f"{name} can't be given with {other}=True")
