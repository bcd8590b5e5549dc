"""UniPC: a predictor and a corrector of the same family, one model call a step.

Zhao et al. 2023, arXiv:2302.04867.
"""

from __future__ import annotations

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
from vqkernels.schedulers._multistep_as_diffusers import unipc
from vqkernels.schedulers._multistep_rows import (
    unipc_corrector,
    unipc_predictor,
    usable_order,
)
from vqkernels.schedulers._scheduler import SchedulerOutput
from vqkernels.schedulers._sigmas import (
    Levels,
    given_levels,
    shift_sigmas,
    stretch_to_terminal,
    time_shift,
)
from vqkernels.schedulers._spacing import check_steps

SOLVERS = ("bh1", "bh2")
_NEARLY_NOISE = 1e-6  # what diffusers leaves of the data at a flow's start: lambda stays finite


class UniPCMultistepScheduler(MultistepScheduler):
    """Each step first corrects its sample with the new prediction, then predicts the next one.

    Both are one pass: the sample is the last corrected one and predictions, added up by the
    predictor; the corrector's weights of the same are another sum, and the difference is linear in
    the predictions alone. Equations: docs/schedulers.md.

    Args:
        num_train_timesteps .. shift_terminal: as in diffusers; docs/schedulers.md lists them.
        numerics: "exact", or "diffusers" for its order of operations and roundings.
        compat: names of faults of diffusers to reproduce; by default none under "exact", all
            under "diffusers".

    Raises:
        ValueError: an argument that does not fit; a `solver_p`.
    """

    _compatibles = KARRAS_SCHEDULERS
    _remembered = (*MultistepScheduler._remembered, "last_sample")
    last_sample: Tensor | None

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
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = (),
        solver_p: None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
        *,
        numerics: str = "exact",
        compat: tuple[str, ...] | None = None,
    ) -> None:
        if solver_type in ("midpoint", "heun", "logrho"):
            self._rename(solver_type="bh2")
        config = self.config
        check_choice("solver_type", config.solver_type, SOLVERS)
        check_choice("time_shift_type", time_shift_type, ("exponential", "linear"))
        if solver_p is not None:
            raise ValueError("solver_p is not supported: it must be None; UniP predicts")
        if shift_terminal is not None and not use_flow_sigmas:
            raise ValueError("shift_terminal goes with use_flow_sigmas=True, got False")
        if use_flow_sigmas:
            check_custom("use_flow_sigmas", ("use_exponential_sigmas", "use_beta_sigmas"), config)
        if not predict_x0 and prediction_type == "flow_prediction":
            raise ValueError(
                "prediction_type must be 'epsilon', 'sample' or 'v_prediction' with "
                "predict_x0=False, got 'flow_prediction'"
            )
        if not predict_x0 and thresholding and self.numerics == "exact":
            raise ValueError(
                "thresholding needs predict_x0=True: diffusers ignores it without, "
                "as numerics='diffusers' does"
            )
        self.predict_x0 = predict_x0
        self._from_last = "discarded_edits" in self.compat
        self.disable_corrector = list(disable_corrector)
        self._rename(disable_corrector=self.disable_corrector)
        self._set_up()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay out the timesteps of `num_inference_steps` model calls, or of a flow's given levels.

        Args:
            num_inference_steps: the number of model calls.
            device: of the timesteps and the table.
            sigmas: descending levels in (0, 1] of a flow (use_flow_sigmas), before shifts.
            mu: the shift of this schedule; needed with use_dynamic_shifting and else without
                effect.

        Raises:
            ValueError: neither number nor sigmas, or ones that do not fit.
        """
        config = self.config
        count = config.num_train_timesteps
        if config.use_dynamic_shifting and mu is None:
            raise ValueError("mu must be given with use_dynamic_shifting=True, got None")
        if sigmas is not None:
            self._finish_flow(self._given(sigmas, num_inference_steps), mu, device)
            return
        if num_inference_steps is None:
            raise ValueError("give num_inference_steps or sigmas, got neither")
        respaced = any(config[name] for name in self._respacers)
        if config.use_flow_sigmas and not respaced:
            steps = check_steps(num_inference_steps, count)
            self._finish_flow(np.linspace(1, 1 / count, steps + 1)[:-1], mu, device)
            return
        places = self._spaced_of(num_inference_steps, count)
        exact, single = self._trained_levels(places, num_inference_steps)
        if config.use_flow_sigmas:
            exact, single = exact / (exact + 1), single / (single + 1)
            places = single * count
        elif respaced:
            places = self._timesteps_of(single)
            places = places.round() if config.use_karras_sigmas else places

        def last(levels: Levels, alphas_cumprod: Tensor) -> float:
            if config.final_sigmas_type == "zero":
                return 0.0
            kept = alphas_cumprod[0]
            return levels[-1].item() if respaced else float(((1 - kept) / kept) ** 0.5)

        exact = np.append(exact, last(exact, self._alphas_cumprod))
        single = np.append(single, last(single, self._single))
        self._finish(exact, single, places, device)

    def _given(self, sigmas: Sequence[float], num_inference_steps: int | None) -> Levels:
        check_custom("sigmas", self._respacers, self.config)
        if not self.config.use_flow_sigmas:
            raise ValueError("sigmas goes with use_flow_sigmas=True, got False")
        levels = given_levels("sigmas", sigmas)
        if levels[0] > 1 or levels[-1] <= 0:
            raise ValueError(f"sigmas must lie in (0, 1], got {levels[-1]} to {levels[0]}")
        if num_inference_steps not in (None, len(levels)):
            raise ValueError(
                f"num_inference_steps must be the number of sigmas, {len(levels)}, or None, "
                f"got {num_inference_steps}"
            )
        return levels

    def _finish_flow(
        self, levels: Levels, mu: float | None, device: torch.device | str | None
    ) -> None:
        config = self.config
        if config.use_dynamic_shifting:
            assert mu is not None
            levels = time_shift(config.time_shift_type, mu, levels)
        else:
            levels = shift_sigmas(levels, config.flow_shift)
        # A level without data stays what it is: no stretch moves it.
        if config.shift_terminal and (levels[-1] != 1 or "shift_terminal_nan" in self.compat):
            levels = stretch_to_terminal(levels, config.shift_terminal)
        if abs(levels[0] - 1) < _NEARLY_NOISE:
            levels[0] -= _NEARLY_NOISE
        places = levels * config.num_train_timesteps
        levels = np.append(levels, 0 if config.final_sigmas_type == "zero" else levels[-1])
        self._finish(levels, levels, places, device)

    # Rows.

    def _order(self, row: int, known: int) -> int:
        """The order of a step that has `known` earlier predictions."""
        left = len(self._values) - row if self.config.lower_order_final else 3
        return min(self.config.solver_order, known + 1, left)

    def _corrects(self, row: int, begin: int) -> bool:
        return row > begin and row - 1 not in self.disable_corrector

    def _columns(self, *, begin: int = 0, **options: Any) -> dict[str, Tensor | float]:
        path, solver, data = self._path, self.config.solver_type, self.predict_x0
        rows = len(self._values)
        # Of the last corrected sample, this step's sample and prediction, and earlier predictions.
        corrected, previous = np.zeros((6, rows)), np.zeros((6, rows))
        predicted = np.zeros(0)
        orders = [self._order(row, max(row - begin, 0)) for row in range(rows)]
        for row in range(rows):
            corrected[1, row] = 1
            if self._corrects(row, begin):
                order = usable_order(path, row - 1, orders[row - 1])
                step = unipc_corrector(path, row - 1, order, solver, data)
                corrected[2 : 3 + order, row] = step.predictions
                if self._from_last:
                    corrected[:2, row] = step.sample, 0
                else:  # the sample holds the last one, moved as the predictor has it
                    corrected[3 : 3 + order, row] -= predicted
            order = usable_order(path, row, orders[row])
            step = unipc_predictor(path, row, order, solver, data)
            predicted = np.array(step.predictions)
            previous[:, row] = step.sample * corrected[:, row]
            previous[2 : 2 + order, row] += predicted
        columns: dict[str, Tensor | float] = {"clip": self._clip()}
        results = {"prev": previous, "extra": corrected} if self._from_last else {"prev": previous}
        for name, values in results.items():
            weights = torch.from_numpy(values)
            history = weights[[0, 3, 4, 5]] if self._from_last else weights[3:]
            columns |= {f"{name}_history_{k}": weight for k, weight in enumerate(history)}
            columns |= self._with_prediction(name, data, weights[1], weights[2])
        of_sample, of_output = self._to_prediction(data)
        return columns | {"prediction_sample": of_sample, "prediction_output": of_output}

    # A step.

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the next timestep of the schedule.

        Args:
            model_output, sample: `[B, ...]`. What was changed in the sample since the last step
                (where it is known, say) stays: the correction is added to it.
            timestep: one of `timesteps`; looked up at the first step of a loop only.
            return_dict: a SchedulerOutput, else `(prev_sample,)`.
            uncond_output, guidance_scale, guidance_rescale: classifier-free guidance in the same
                pass, `model_output` being the conditional one; numbers, or one value a sample.
                arXiv:2207.12598, arXiv:2305.08891.

        Raises:
            ValueError: no `set_timesteps` before, a timestep outside of the schedule, a step after
                the last.
        """
        self._check_exact(uncond_output=uncond_output)
        row = self._next_row(timestep)
        if self.numerics == "diffusers":
            previous = self._step_as_diffusers(model_output, row, sample)
        else:
            previous, _ = self._advance(
                sample,
                model_output,
                row,
                uncond_output=uncond_output,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
            )
        self._step_index = row + 1
        return SchedulerOutput(previous) if return_dict else (previous,)

    def _forget(self) -> None:
        super()._forget()
        self.last_sample = None

    def _advance(
        self,
        sample: Tensor,
        model_output: Tensor,
        index: int | Tensor,
        **operands: Any,
    ) -> tuple[Tensor, Tensor | None]:
        row = self._row_of(index)
        if self._taken == 0:
            self._start(row)
        operands["want_prediction"] = True
        history = self._earlier()
        if self._from_last:
            # The corrected sample, written where it isn't the sample itself and is read again.
            reads = [self._corrects(row, self._begin), self._corrects(row + 1, self._begin)]
            operands["want_extra"] = all(reads) and row + 1 < len(self._values)
            history = [self.last_sample, *history] if self.last_sample is not None else []
        result = self._denoise(sample, model_output, index, history=history, **operands)
        self._remember(result.prediction)
        if self._from_last:
            self.last_sample = sample if result.extra is None else result.extra
        return result.prev_sample, result.prediction

    def _step_as_diffusers(self, model_output: Tensor, row: int, sample: Tensor) -> Tensor:
        if self._taken == 0:
            self._start(row)
        solver, data = self.config.solver_type, self.predict_x0
        prediction = self._prediction_as_diffusers(model_output, row, sample)
        if self._corrects(row, self._begin):
            assert self.last_sample is not None
            order = self._order(row - 1, self._taken - 1)
            around = self._around(row, order + 1)
            sample = unipc(
                self.last_sample, prediction, self._earlier(), around, solver, order, data
            )
        order = self._order(row, self.lower_order_nums)
        self._remember(prediction)
        self.last_sample = sample
        around = self._around(row + 1, order + 1)
        return unipc(sample, None, self._earlier(), around, solver, order, data)

    def _prediction_as_diffusers(self, output: Tensor, row: int, sample: Tensor) -> Tensor:
        kind = self.config.prediction_type
        alpha, sigma = self._split(self.sigmas[row])
        if not self.predict_x0:
            if kind == "epsilon":
                return output
            if kind == "sample":
                return (sample - alpha * output) / sigma
            return alpha * output + sigma * sample
        if kind == "epsilon":
            data = (sample - sigma * output) / alpha
        elif kind == "sample":
            data = output
        elif kind == "v_prediction":
            data = alpha * sample - sigma * output
        else:
            data = sample - self.sigmas[row] * output
        return self._clipped_as_diffusers(data)
