"""Interleaved timing: every version of a row is called in turn, round after round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]


@dataclass(frozen=True)
class Budget:
    """How long one row may take: at least `min_rounds`, then until `seconds` or `max_rounds`."""

    seconds: float
    min_rounds: int
    max_rounds: int = 60
    sample_seconds: float = 2e-3


FULL = Budget(seconds=5.0, min_rounds=5)
QUICK = Budget(seconds=0.8, min_rounds=3)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: quantiles over `samples` samples."""

    p20: float
    p50: float
    p80: float
    samples: int


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def seconds_of(call: Call, repeats: int = 1) -> float:
    """Seconds of one call, the average over `repeats` calls back to back."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleave(
    calls: Mapping[str, Call],
    budget: Budget,
    *,
    expected_seconds: Mapping[str, float],
    between: Call | None = None,
) -> dict[str, Timing]:
    """Times every call once a round, in an order that rotates from round to round.

    Calls expected to be short are repeated inside a sample until it lasts
    `budget.sample_seconds`. `between` runs once a round, untimed. Every call must have been run
    before (libraries loaded, buffers grown): warm-up is the caller's, and the same for all.
    """
    names = list(calls)
    repeats = {
        name: max(1, round(budget.sample_seconds / max(expected_seconds[name], 1e-7)))
        for name in names
    }
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _without_garbage_collection():
        started = time.perf_counter()
        for turn in range(budget.max_rounds):
            if between is not None:
                between()
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(1e3 * seconds_of(calls[name], repeats[name]))
            if turn + 1 >= budget.min_rounds and time.perf_counter() - started > budget.seconds:
                break
    return {name: summarize(values) for name, values in samples.items()}


def summarize(milliseconds: list[float]) -> Timing:
    ordered = sorted(milliseconds)
    return Timing(
        p20=quantile(ordered, 0.2),
        p50=quantile(ordered, 0.5),
        p80=quantile(ordered, 0.8),
        samples=len(ordered),
    )


def quantile(ordered: list[float], share: float) -> float:
    """The `share` quantile of sorted values, interpolated between neighbours."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
