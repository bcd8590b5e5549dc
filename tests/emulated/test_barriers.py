"""Every barrier and every wait of csrc/cuda is needed: without it, some case fails."""

from __future__ import annotations

import functools
import re
import time

import pytest
from cases import Case, cases
from cuda_calls import CudaCalls
from emulator import CSRC, KERNELS, Emulator, modes

CALL = re.compile(
    r"\b(__syncthreads(_and|_or|_count)?|__syncwarp|cp_async_wait<.*>|warpgroup_wait<.*>"
    r"|mbarrier_wait)\("
)
# Where these calls are declared, not made.
WRAPPERS = {"language.h", "tensor_core.h"}
ORDERS = [("forward", 0), ("reverse", 0), ("shuffled", 1)]

pytestmark = pytest.mark.skipif(modes() == ["asan"], reason="needs the race build")


def barriers() -> list[tuple[str, int]]:
    """(file, line) of each."""
    places = []
    for path in sorted((CSRC / "cuda").iterdir()):
        if path.suffix not in {".cu", ".h"} or path.name in WRAPPERS:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            places += [(path.name, number)] * len(CALL.findall(code))
    return places


@functools.cache
def emulator() -> Emulator:
    return Emulator("race", KERNELS)


def run(case: Case) -> None:
    try:
        case.run(CudaCalls(emulator().library, emulator().declare, case.device))
    finally:
        emulator().forget()


@functools.cache
def reached() -> dict[tuple[str, int], list[Case]]:
    """The cases that reach each place, fastest first; every case passes as the kernels are."""
    emulator().set_order("forward")
    seconds: dict[str, float] = {}
    found: dict[tuple[str, int], list[Case]] = {place: [] for place in barriers()}
    for case in cases():
        emulator().forget_reached()
        start = time.perf_counter()
        run(case)
        seconds[case.name] = time.perf_counter() - start
        for place, by in found.items():
            if emulator().times_reached(*place):
                by.append(case)
    for by in found.values():
        by.sort(key=lambda case: seconds[case.name])
    return found


def test_no_two_on_a_line() -> None:
    places = barriers()
    assert len(places) == len(set(places))
    assert places


@pytest.mark.parametrize(("file", "line"), sorted(set(barriers())))
def test_barrier_is_needed(file: str, line: int) -> None:
    by = reached()[file, line]
    assert by, f"no case reaches {file}:{line}"
    for order, seed in ORDERS:
        emulator().set_order(order, seed)
        for case in by:
            with emulator().disabled(file, line):
                try:
                    run(case)
                except (AssertionError, RuntimeError):
                    return
    pytest.fail(f"every case passes without {file}:{line}; if it is redundant, take it out")
