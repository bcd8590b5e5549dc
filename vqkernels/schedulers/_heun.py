"""Heun's method as rows of the step table: two model calls a level, one at the last.

Rows 0, 2, 4, ... are first calls: an Euler step, whose slope is kept as the op's extra result.
Row 2 i + 1 is the second call, at the level that row 2 i arrived at: from the first call's sample
again, with the mean of both slopes. `history` of a second call is (first sample, first slope).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqkernels.schedulers._sigma_scheduler import SigmaScheduler
from vqkernels.schedulers._sigmas import Levels


def doubled(values: Levels) -> Levels:
    """All but the first twice: what the rows' model calls see."""
    return np.concatenate([values[:1], np.repeat(values[1:], 2)])


class HeunPairs(SigmaScheduler):
    """What a first call leaves to the second, and the rows of both."""

    order = 2
    _remembered: ClassVar[tuple[str, ...]] = ("_first",)
    _first: tuple[Tensor, Tensor] | None = None  # sample and slope of a first call

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next step is a first call."""
        return self._first is None

    def _taken(self, index: int | Tensor) -> tuple[Tensor, Tensor] | None:
        """What the first call left if this is a second one, else None."""
        second = self._first is not None if isinstance(index, Tensor) else index % 2 == 1
        if second and self._first is None:
            raise ValueError(
                f"begin_index must be even, for a step whose second model call follows, got {index}"
            )
        first, self._first = self._first, None
        return first if second else None

    def _changes(self, raised: Tensor) -> Tensor:
        """How far the level falls, a second call's over the same interval as its first."""
        change = self._sigmas[1:] - raised
        change[1::2] = change[:-1:2]
        return change

    def _pairs(self, change: Tensor, **slope: Tensor) -> dict[str, Tensor | float]:
        """Columns of rows whose slope has these weights of sample, prediction and output."""
        second = torch.arange(len(change)) % 2 == 1
        share = torch.where(second, change / 2, change)
        columns: dict[str, Tensor | float] = {
            "prev_history_0": second.double(),
            "prev_history_1": share * second,
        }
        for name, weight in {"sample": torch.zeros_like(change), **slope}.items():
            columns[f"extra_{name}"] = weight
            columns[f"prev_{name}"] = share * weight
        columns["prev_sample"] = columns["prev_sample"] + (~second).double()
        return columns

    def _advance(
        self, sample: Tensor, model_output: Tensor, index: int | Tensor, **operands: Any
    ) -> tuple[Tensor, Tensor | None]:
        first = self._taken(index)
        if first is not None:
            return super()._advance(sample, model_output, index, history=first, **operands)
        result = self._denoise(sample, model_output, index, want_extra=True, **operands)
        assert result.extra is not None
        self._first = sample, result.extra
        return result.prev_sample, result.prediction
