"""Measures one case in a fresh process, with a fixed number of threads on as many cores.

`python -m benchmarks.worker` is started by the runner: the thread pools of OpenMP, MKL and
OpenBLAS take their size from the environment it sets, before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import ceilings, machine
from .case import OURS, Case, Check, Provider
from .records import Record
from .suite import find_case
from .timing import FULL, QUICK, Budget, Timing, interleave, seconds_of

# A first call also loads libraries and touches fresh memory, which says nothing of short calls.
HOPELESS = 2.0
SHORT_SECONDS = 0.1
LONG_SECONDS = 0.5


@dataclass
class Candidate:
    """A provider in one configuration, run and ready to be timed."""

    config: str
    call: Any
    output: Any
    seconds: float
    peak_mib: float


def choose_variant(case: Case, provider: Provider, inputs: Any) -> Candidate:
    """Runs every variant and keeps the fastest; one whose first call is hopeless is left there."""
    candidates: list[Candidate] = []
    for variant in provider.variants:
        call = variant.bind(inputs)
        start = time.perf_counter()
        output, peak = machine.with_peak_memory(call)
        seconds = time.perf_counter() - start
        output = case.keep(output)
        fastest = min((candidate.seconds for candidate in candidates), default=seconds)
        if seconds < max(HOPELESS * fastest, SHORT_SECONDS):
            seconds = min(seconds_of(call) for _ in range(1 if seconds > LONG_SECONDS else 3))
        candidates.append(Candidate(variant.name, call, output, seconds, peak))
    return min(candidates, key=lambda candidate: candidate.seconds)


def measure(
    case: Case, *, threads: int, budget: Budget, data: str, fma: ceilings.FmaRate
) -> list[Record]:
    """Chooses configurations, checks results, then times what passed, interleaved."""
    load_average = machine.load_average()
    inputs = case.inputs(data)
    candidates: dict[str, Candidate] = {}
    notes: dict[str, str] = {}
    for provider in case.providers():
        try:
            candidates[provider.name] = choose_variant(case, provider, inputs)
        except ImportError as error:
            notes[provider.name] = f"not installed: {error.name}"
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")[:200]
            notes[provider.name] = f"failed: {type(error).__name__}: {first_line}"

    checks = case.check(inputs, {name: c.output for name, c in candidates.items()})
    for name, check in checks.items():
        if check.refusal:
            notes[name] = f"refused: {check.refusal}"
            del candidates[name]

    copy_rate = ceilings.copy(int(min(case.bytes_moved, 2 * ceilings.COPY_BYTES))).rate
    neighbours = machine.Neighbours()
    calls = {name: candidate.call for name, candidate in candidates.items()}
    expected = {name: candidate.seconds for name, candidate in candidates.items()}
    timings = {}
    if calls:
        timings = interleave(calls, budget, expected_seconds=expected, between=fma.measure)
    busy = neighbours.cores_busy()
    floor_ms = 1e3 * max(case.operations / fma.best, case.bytes_moved / copy_rate)

    def record(provider: str) -> Record:
        return Record(
            **_row_fields(case, threads, data, load_average, busy),
            provider=provider,
            note=notes.get(provider, ""),
            floor_ms=floor_ms,
            **_timed_fields(timings.get(provider), candidates.get(provider), floor_ms),
            **_check_fields(checks, provider),
            packed_mib=_packed_mib(case, inputs) if provider == OURS else float("nan"),
        )

    return [record(provider.name) for provider in case.providers()]


def _row_fields(
    case: Case, threads: int, data: str, load_average: float, busy: float
) -> dict[str, Any]:
    return {
        "op": case.op,
        "name": case.name,
        "shape": case.shape,
        "mode": case.mode,
        "dtype": case.dtype,
        "data": data,
        "threads": threads,
        "device": machine.device_name(),
        "versions": machine.versions(),
        "load_average": load_average,
        "cores_busy_elsewhere": busy,
    }


def _timed_fields(
    timing: Timing | None, candidate: Candidate | None, floor_ms: float
) -> dict[str, Any]:
    if timing is None or candidate is None:
        return {}
    return {
        "config": candidate.config,
        "ms_p20": timing.p20,
        "ms_p50": timing.p50,
        "ms_p80": timing.p80,
        "samples": timing.samples,
        "peak_mib": candidate.peak_mib,
        "floor_share": floor_ms / timing.p50,
    }


def _check_fields(checks: Mapping[str, Check], provider: str) -> dict[str, Any]:
    if provider not in checks:
        return {}
    return {"checked": checks[provider].checked, "mismatches": checks[provider].mismatches}


def _packed_mib(case: Case, inputs: Any) -> float:
    try:
        packed = case.packed_bytes(inputs)
    except Exception:
        packed = None
    return float("nan") if packed is None else packed / machine.MEBIBYTE


def measure_ceilings(fma: ceilings.FmaRate, threads: int) -> list[Record]:
    """Fma, matmul fp32 and bf16, and copy as records: `note` holds the rate."""
    measured = [
        ceilings.fma(fma),
        ceilings.matmul(torch.float32),
        ceilings.matmul(torch.bfloat16),
        ceilings.copy(),
    ]
    load_average = machine.load_average()
    records = []
    for ceiling in measured:
        best = 1e3 * min(ceiling.seconds)
        records.append(
            Record(
                op="ceiling",
                name=ceiling.name,
                shape=ceiling.shape,
                mode="best of several",
                dtype=ceiling.dtype,
                data="",
                threads=threads,
                provider="machine",
                ms_p20=best,
                ms_p50=best,
                ms_p80=best,
                samples=len(ceiling.seconds),
                note=f"{ceiling.rate / 1e9:.1f} G{ceiling.unit}",
                device=machine.device_name(),
                versions=machine.versions(),
                load_average=load_average,
            )
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description="measure one case; started by the runner")
    parser.add_argument("--case", help="key of the case; without one, the machine's ceilings")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", required=True)
    parser.add_argument("--fma-library", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    machine.pin(options.threads)
    torch.set_num_threads(options.threads)
    fma = ceilings.FmaRate(options.fma_library, options.threads)
    if options.case is None:
        records = measure_ceilings(fma, options.threads)
    else:
        records = measure(
            find_case(options.case),
            threads=options.threads,
            budget=QUICK if options.quick else FULL,
            data=options.data,
            fma=fma,
        )
    options.out.write_text(json.dumps([vars(record) for record in records]))


if __name__ == "__main__":
    main()
