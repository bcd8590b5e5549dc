"""What all schedulers share: the table of coefficients, the place in it, one op call a step.

A sampler is a table. `set_timesteps` lays out the timesteps of the model calls, and `_columns`
computes, in float64, the coefficients of `vqkernels.denoise_step`, one row a model call. `step`
finds its row and makes one call. A subclass says what the rows hold:

    set_timesteps   computes timesteps and calls `_lay_out(timesteps, device)`
    _columns        `{column name: float64 [T] or float}` for the present timesteps and the given
                    options of `step`, whose names and defaults are `_defaults`
    step            arguments as in diffusers; takes its row from `_row` or `_next_row`, its noise
                    from `_noise`, then `_tabulate(...)` and `_advance(...)`, or the same step in
                    diffusers' order of operations under numerics="diffusers"
    _advance        only where a step needs more than its row: a history, a split output
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqkernels.ops.denoise_step import (
    COLUMNS,
    DenoiseStepOutput,
    denoise_coefficients,
    denoise_step,
)
from vqkernels.ops.normal_noise import normal_noise
from vqkernels.schedulers._config import Configured
from vqkernels.schedulers._noise import STEP_STREAM, Generators, check_source, draw


@dataclass
class SchedulerOutput:
    """What a step returns. `output.prev_sample`, `output["prev_sample"]`, `output[0]`."""

    prev_sample: Tensor

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        return self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)


@dataclass
class PredictionOutput(SchedulerOutput):
    """`pred_original_sample` is the denoised sample x_0 as predicted at this step."""

    pred_original_sample: Tensor | None = None


class Scheduler(Configured):
    """Base of the schedulers; see the module's docstring for what a subclass provides."""

    order = 1
    init_noise_sigma: float | Tensor = 1.0
    num_inference_steps: int | None = None
    timesteps: Tensor

    _threshold = "none"  # `denoise_step`'s threshold and ratio
    _ratio = 0.995
    _draws = False  # whether the table has noise in a row
    _table: Tensor | None = None  # [T, 22] of `denoise_step`, float32
    _remembered: ClassVar[tuple[str, ...]] = ()  # attributes that a step leaves to the next one
    _defaults: ClassVar[dict[str, Any]] = {}  # arguments of `step` that the table depends on
    _options: dict[str, Any] | None = None  # their values in the present table
    _guidance: tuple[float | Tensor, float | Tensor] = (1.0, 0.0)  # in the table's columns 0 and 1
    _rows: Tensor  # arange(T) beside the table: its views are row indices
    _values: list[float]  # `timesteps` on the host
    _rows_of: dict[float, list[int]]  # where in `timesteps` a value is
    _step_index: int | None = None
    _begin_index: int | None = None
    _fresh: dict[str, Any]  # `memory()` before a first step

    # The schedule.

    def _lay_out(self, timesteps: Tensor, device: torch.device | str | None = None) -> None:
        """Start a schedule of these timesteps, one a model call."""
        self._values, self._rows_of = timesteps.tolist(), {}
        for row, value in enumerate(self._values):
            self._rows_of.setdefault(value, []).append(row)
        self.timesteps = timesteps.to(device)
        self._rows = torch.arange(len(timesteps), device=device)
        self._step_index = self._begin_index = None
        self._table = self._options = None
        self._fresh = self.memory()
        if self.numerics == "exact":
            self._tabulate()

    def _columns(self, **options: Any) -> dict[str, Tensor | float]:
        raise NotImplementedError

    def _tabulate(self, **options: Any) -> Tensor:
        """The table for these options of `step`, built unless it is the present one."""
        self._check_laid_out()
        options = {**(self._options or self._defaults), **options}
        if self._table is None or options != self._options:
            table = denoise_coefficients(**self._columns(**options))
            self._draws = bool(table[:, COLUMNS.index("prev_noise")].any())
            self._table = table.to(self._rows.device)
            self._options, self._guidance = options, (1.0, 0.0)
        return self._table

    @property
    def coefficients(self) -> Tensor:
        """`[T, 22]`, float32: the rows that `vqkernels.denoise_step` takes, one a model call."""
        return self._tabulate()

    def _check_laid_out(self) -> None:
        if not hasattr(self, "_rows_of"):
            raise ValueError("num_inference_steps must be set before a step: call set_timesteps")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The model's input for a sample: here the sample itself."""
        return sample

    # The place in the schedule.

    @property
    def step_index(self) -> int | None:
        """The row of the next step, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The row of the first step, None unless `set_begin_index` was called."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this row and count from there: steps then ask no device for a timestep."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The row of a timestep; of its repetitions the second, as diffusers starts there.

        Raises:
            ValueError: the timestep is not in the schedule.
        """
        self._check_laid_out()
        if isinstance(timestep, Tensor):
            row = self._place(timestep)
            if row is not None and len(self._rows_of) == len(self._values):
                return row
            timestep = timestep.item()
        rows = self._rows_of.get(timestep, ())
        if not rows:
            raise ValueError(
                f"timestep must be one of the {len(self._values)} of the schedule "
                f"({self._ends()}), got {timestep}"
            )
        return rows[min(1, len(rows) - 1)]

    def _place(self, timestep: Tensor) -> int | None:
        """The row of an element of `self.timesteps`, known by where it lies in memory.

        `for t in scheduler.timesteps` gives such elements; no device is asked for a value.
        """
        if timestep.numel() != 1:
            raise ValueError(f"timestep must be one value, got shape {list(timestep.shape)}")
        mine = self.timesteps
        if timestep.dtype != mine.dtype or timestep.device != mine.device:
            return None
        if torch.compiler.is_compiling():  # traced tensors lie nowhere
            return None
        if timestep.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr():
            return None
        return int(timestep.storage_offset() - mine.storage_offset())

    def _row(self, timestep: float | Tensor) -> int:
        """The row of a step of a sampler that may jump: told by the timestep where that is free.

        A tensor that isn't an element of `self.timesteps` is read only without a begin index.
        """
        self._check_laid_out()
        known = not isinstance(timestep, Tensor) or self._place(timestep) is not None
        if known or self._begin_index is None:
            return self._inside(self.index_for_timestep(timestep))
        return self._next_row(timestep)

    def _next_row(self, timestep: float | Tensor) -> int:
        """The row of a step of a sampler that counts: the timestep tells only the first."""
        self._check_laid_out()
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        return self._inside(self._step_index)

    def _inside(self, row: int) -> int:
        if not 0 <= row < len(self._values):
            raise ValueError(
                f"the schedule has {len(self._values)} steps, got one more: call set_timesteps "
                "before the next loop"
            )
        return row

    def _ends(self) -> str:
        return f"{self._values[0]:g} to {self._values[-1]:g}"

    # A loop that is driven by row numbers: `vqkernels.schedulers.sample`.

    def begin_loop(self) -> None:
        """Forget the steps of an earlier loop over the same timesteps."""
        self._check_laid_out()
        if self.numerics == "exact":
            self._tabulate(**self._defaults)  # not what the last `step` asked for
        self.set_begin_index(0)
        self.resume_loop(0, self._fresh)

    def next_sample(
        self, sample: Tensor, model_output: Tensor, row: int, **operands: Any
    ) -> Tensor:
        """`step` by the number of the row, which gives the next sample alone.

        Args:
            sample, model_output: `[B, ...]`.
            row: the model call's number, from 0; steps follow one another.
            **operands: `seed` and `sample_ids` or `noise`; `uncond_output`, `guidance_scale` and
                `guidance_rescale`.

        Raises:
            ValueError: a row outside of the schedule, numerics that are not "exact".
        """
        if self.numerics != "exact":
            raise ValueError(f"next_sample needs numerics='exact', got {self.numerics!r}")
        self._check_laid_out()
        row = self._inside(row)
        previous, _ = self._advance(sample, model_output, row, want_prediction=False, **operands)
        self._step_index = row + 1
        return previous

    def memory(self) -> dict[str, Any]:
        """What steps so far leave to the next one, by attribute; tensors are not copied."""
        return {name: getattr(self, name) for name in self._remembered}

    def resume_loop(self, row: int, memory: dict[str, Any]) -> None:
        """Go on at a row with what `memory` gave there, at any time or in another process.

        Raises:
            ValueError: the memory of another kind of scheduler.
        """
        if set(memory) != set(self._remembered):
            raise ValueError(f"memory must hold {sorted(self._remembered)}, got {sorted(memory)}")
        for name, value in memory.items():
            setattr(self, name, value)
        self._step_index = row

    # A step.

    def _noise(
        self,
        like: Tensor,
        row: int,
        *,
        noise: Tensor | None = None,
        generator: Generators = None,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Noise of like's shape as arguments of `_advance`: a tensor, or in exact mode a key."""
        check_source(noise, generator, seed)
        if noise is not None:
            return {"noise": noise}
        if seed is None:
            if sample_ids is not None:
                raise ValueError("sample_ids goes with seed, got no seed")
            return {"noise": draw(like, generator, dtype)}
        if self.numerics == "exact":
            return {"seed": seed, "sample_ids": sample_ids}
        return {"noise": self._keyed(like, self._rows[row], seed, sample_ids, dtype)}

    def _keyed(
        self,
        like: Tensor,
        row: Tensor,
        seed: int | Tensor,
        sample_ids: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The noise that the step op draws itself from this key."""
        return normal_noise(
            like.shape,
            seed=seed,
            sample_ids=sample_ids,
            step=row,
            stream=STEP_STREAM,
            dtype=dtype or like.dtype,
            device=like.device,
        )

    def _denoise(
        self,
        sample: Tensor,
        model_output: Tensor,
        index: int | Tensor,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        guidance_rescale: float | Tensor = 0.0,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        sample_ids: Tensor | None = None,
        want_prediction: bool = True,
        **operands: Any,
    ) -> DenoiseStepOutput:
        """One step of the present table.

        Args:
            sample, model_output: `[B, ...]`.
            index: the row, an int or an int64 scalar on the sample's device (then neither the
                host nor the device waits).
            uncond_output: the output without the condition; turns guidance on.
            guidance_scale, guidance_rescale: numbers, or tensors of one value or one a sample.
            noise: the step's normals; or `seed` and `sample_ids`, from which the op draws those
                of step `index`, stream 1. Neither where the row has no noise.
            **operands: further arguments of `denoise_step`.
        """
        self._move(sample.device)
        table = self._tabulate()
        row = self._rows[index] if isinstance(index, int) else index
        if not self._draws:  # making a key takes a third of a short step
            noise = seed = sample_ids = None
        guidance = (guidance_scale, guidance_rescale)
        a_sample = any(isinstance(value, Tensor) for value in guidance)
        if uncond_output is None:
            if a_sample or guidance != (1.0, 0.0):
                raise ValueError("guidance_scale and guidance_rescale need uncond_output, got None")
        else:
            operands["uncond_output"] = uncond_output
            if a_sample:
                table = _rows_guided(table, row, guidance, len(sample))
                if seed is not None:
                    # The op would take the sample's row of this table for the step.
                    noise = self._keyed(sample, row, seed, sample_ids, torch.float32)
                    seed = sample_ids = None
                row = torch.arange(len(table), device=sample.device)
            elif guidance != self._guidance:
                table[:, 0], table[:, 1] = guidance
                self._guidance = guidance
        return denoise_step(
            sample,
            model_output,
            table,
            index=row,
            noise=noise,
            seed=seed,
            sample_ids=sample_ids,
            stream=STEP_STREAM,
            threshold=self._threshold,
            ratio=self._ratio,
            want_prediction=want_prediction,
            **operands,
        )

    def _advance(
        self, sample: Tensor, model_output: Tensor, index: int | Tensor, **operands: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`(prev_sample, prediction or None)` of one step; arguments are those of `_denoise`."""
        result = self._denoise(sample, model_output, index, **operands)
        return result.prev_sample, result.prediction

    def _move(self, device: torch.device) -> None:
        """Take table and rows to the samples' device, where `set_timesteps` wasn't told it."""
        if self._rows.device != device:
            self._rows = self._rows.to(device)
            self._table = self._tabulate().to(device)

    def _check_exact(self, **guidance: Tensor | None) -> None:
        if self.numerics != "exact" and any(value is not None for value in guidance.values()):
            name = next(iter(guidance))
            raise ValueError(f"{name} needs numerics='exact', got {self.numerics!r}")


def _rows_guided(
    table: Tensor, row: Tensor, guidance: tuple[float | Tensor, float | Tensor], batch: int
) -> Tensor:
    """The row once a sample, each with its own guidance: `[B, 22]`."""
    rows = table[row].repeat(batch, 1)
    rows[:, 0], rows[:, 1] = guidance
    return rows
