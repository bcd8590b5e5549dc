"""Interleaved timing of GPU calls: cold caches one call at a time, and warm ones back to back.

    cold L2   before every sample a 256 MiB buffer is overwritten, which empties the L2 cache and
              keeps the GPU busy while the host prepares the call; one call between two events.
    warm L2   a CUDA graph of several calls back to back between two events, over their number: the
              host's share is gone and the inputs lie in L2 where they fit. This is how the peers
              publish (they call back to back, without a flush).

Providers take turns, in an order that rotates from round to round; medians are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from benchmarks.timing import Budget, Timing, summarize

from .device import Call, Device

COLD, WARM = "cold L2", "warm L2"
FULL = Budget(seconds=1.0, min_rounds=11, max_rounds=101)
DRY = Budget(seconds=0.0, min_rounds=2, max_rounds=2)
_GRAPH_MILLISECONDS = 4.0
_MOST_CALLS = 32

Sampler = Callable[[], float]


def cold(device: Device, call: Call) -> Sampler:
    def sample() -> float:
        device.flush()
        return device.milliseconds(call)

    return sample


def warm(device: Device, call: Call, expected: float) -> tuple[Sampler, str]:
    """The sampler, and how it repeats the call; `expected` milliseconds of one call."""
    times = max(2, min(_MOST_CALLS, round(_GRAPH_MILLISECONDS / max(expected, 1e-3))))
    try:
        replay = device.repeated(call, times)
        how = "graph"
    except RuntimeError:
        device.synchronize()

        def replay() -> None:
            for _ in range(times):
                call()

        how = "no graph"
    replay()
    device.synchronize()
    return lambda: device.milliseconds(replay) / times, how


def interleave(samplers: Mapping[str, Sampler], budget: Budget) -> dict[str, Timing]:
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for turn in range(budget.max_rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(samplers[name]())
        if turn + 1 >= budget.min_rounds and time.perf_counter() - begin > budget.seconds:
            break
    return {name: summarize(values) for name, values in samples.items()}
