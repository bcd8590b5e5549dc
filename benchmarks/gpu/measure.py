"""Measures one case on a GPU: chooses configurations, checks results, times what is right."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import machine
from benchmarks.case import Check, Provider
from benchmarks.ceilings import Ceiling
from benchmarks.records import NAN, Record
from benchmarks.timing import Budget, Timing

from . import ceilings
from .cases import SMALL, Case
from .device import Call, Device
from .timing import WARM, Sampler, cold, interleave, warm

DEVICE_THREADS = 1
_REPEATS_TO_CHOOSE = 3


@dataclass
class Candidate:
    """A provider in its fastest configuration, warmed up."""

    config: str
    call: Call
    output: Any
    milliseconds: float
    peak_mib: float


def versions() -> str:
    """As `machine.versions`, with what a GPU adds."""
    try:
        import triton

        of_triton = triton.__version__
    except ImportError:
        of_triton = "absent"
    return f"{machine.versions()}; triton {of_triton}; cuda {torch.version.cuda or 'absent'}"


def choose(case: Case, provider: Provider, inputs: Any, device: Device) -> Candidate:
    """The fastest variant that runs. Raises what the last one raised if none does."""
    best: Candidate | None = None
    failure: Exception | None = None
    for variant in provider.variants:
        try:
            call = variant.bind(inputs)
            # The first call compiles, loads and grows pools; a training step's later calls no
            # longer start from the inputs, so it is the first one that is checked.
            kept = case.keep(call())
            peak = device.with_peak_memory(call)[1]
            each = min(device.milliseconds(call) for _ in range(_REPEATS_TO_CHOOSE))
        except Exception as error:
            failure = error
            gc.collect()
            continue
        if best is None or each < best.milliseconds:
            best = Candidate(variant.name, call, kept, each, peak)
    if best is None:
        raise failure or RuntimeError("no variant")
    return best


def measure(case: Case, device: Device, budget: Budget, rates: dict[str, Ceiling]) -> list[Record]:
    """Records of every provider in every mode of the case; one that fails or is wrong has a note.

    `rates` are the register loops' ceilings, empty where rates.cu could not be built.
    """
    inputs: Any = case.inputs(device)
    candidates: dict[str, Candidate] = {}
    notes: dict[str, str] = {}
    providers = case.providers(device)
    for provider in providers:
        try:
            candidates[provider.name] = choose(case, provider, inputs, device)
        except ImportError as error:
            notes[provider.name] = f"not installed: {error.name}"
        except Exception as error:
            notes[provider.name] = f"failed: {type(error).__name__}: {_first_line(error)}"
    checks = case.check(inputs, {n: c.output for n, c in candidates.items()}, device)
    for name, check in checks.items():
        if check.refusal:
            notes[name] = f"refused: {check.refusal}"
            del candidates[name]
    floor, floor_note = floor_ms(case, device, rates)

    records = []
    for mode in case.modes:
        samplers: dict[str, Sampler] = {}
        hows: dict[str, str] = {}
        for name, candidate in candidates.items():
            if mode == WARM:
                samplers[name], hows[name] = warm(device, candidate.call, candidate.milliseconds)
            else:
                samplers[name] = cold(device, candidate.call)
        timings = interleave(samplers, budget) if samplers else {}
        records += [
            Record(
                **_row(case, mode, device),
                provider=provider.name,
                floor_ms=floor,
                note=notes.get(provider.name, floor_note),
                **_timed(
                    timings.get(provider.name),
                    candidates.get(provider.name),
                    hows.get(provider.name, ""),
                    floor,
                ),
                **_checked(checks.get(provider.name)),
            )
            for provider in providers
        ]
    return records


def floor_ms(case: Case, device: Device, rates: dict[str, Ceiling]) -> tuple[float, str]:
    """The least time of the case's operations and bytes, and what it was taken from.

    Few dimensions: one subtraction and one minimum a score, whatever multiplies. Else the matrix
    product at the rate of x's dtype; an fp32 search that is screened on tensor cores can pass it.
    """
    moved = 1e3 * case.bytes_moved / ceilings.copy(device).rate
    if case.stage == SMALL:
        if "epilogue" not in rates:
            return NAN, "no floor: rates.cu was not built"
        return max(moved, 1e3 * case.scores / rates["epilogue"].rate), ""
    rate = ceilings.matmul(device, getattr(torch, case.dtype)).rate
    return max(moved, 1e3 * case.operations / rate), ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]


def _row(case: Case, mode: str, device: Device) -> dict[str, Any]:
    return {
        "op": case.op,
        "name": case.name,
        "shape": case.shape,
        "mode": mode,
        "dtype": case.dtypes,
        "data": case.data,
        "threads": DEVICE_THREADS,
        "device": device.name(),
        "versions": versions(),
        "load_average": machine.load_average(),
    }


def _timed(
    timing: Timing | None, candidate: Candidate | None, how: str, floor: float
) -> dict[str, Any]:
    if timing is None or candidate is None:
        return {}
    return {
        "config": ", ".join(filter(None, (candidate.config, how))),
        "ms_p20": timing.p20,
        "ms_p50": timing.p50,
        "ms_p80": timing.p80,
        "samples": timing.samples,
        "peak_mib": candidate.peak_mib,
        "floor_share": floor / timing.p50,
    }


def _checked(check: Check | None) -> dict[str, Any]:
    return {} if check is None else {"checked": check.checked, "mismatches": check.mismatches}


def ceiling_records(found: list[Ceiling], device: Device) -> list[Record]:
    """The ceilings as records: `note` holds the rate."""
    return [
        Record(
            op="ceiling",
            name=ceiling.name,
            shape=ceiling.shape,
            mode="best of several",
            dtype=ceiling.dtype,
            data="",
            threads=DEVICE_THREADS,
            provider="machine",
            ms_p50=1e3 * min(ceiling.seconds) if ceiling.seconds else NAN,
            samples=len(ceiling.seconds),
            note=f"{ceiling.rate / 1e9:.6g} G{ceiling.unit}",
            device=device.name(),
            versions=versions(),
            load_average=machine.load_average(),
        )
        for ceiling in found
    ]
