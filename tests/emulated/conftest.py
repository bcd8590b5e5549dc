from __future__ import annotations

from collections.abc import Iterator

import pytest
from emulator import KERNELS, SELFTEST, Emulator, modes


@pytest.fixture(params=modes(), scope="session")
def selftest(request: pytest.FixtureRequest) -> Emulator:
    """The kernels of emulation_selftest.cu, in each build that this process can load."""
    return Emulator(request.param, SELFTEST)


@pytest.fixture(scope="session")
def checked() -> Emulator:
    """The same in the build that finds every memory fault."""
    return Emulator("race", SELFTEST)


@pytest.fixture(params=modes(), scope="session")
def _kernels(request: pytest.FixtureRequest) -> Emulator:
    return Emulator(request.param, KERNELS)


@pytest.fixture
def kernels(_kernels: Emulator) -> Iterator[Emulator]:
    """The kernels of csrc/cuda, in each build that this process can load."""
    _kernels.set_order("forward")
    yield _kernels
    _kernels.forget()


_ops: dict[str, Emulator] = {}


def _of_mode(mode: str) -> Iterator[Emulator]:
    if mode not in _ops:
        _ops[mode] = Emulator(mode)
    emulator = _ops[mode]
    emulator.set_order("forward")
    yield emulator
    emulator.forget()


@pytest.fixture(params=modes())
def ops(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """The launchers of csrc/cuda, in each build that this process can load."""
    yield from _of_mode(request.param)


@pytest.fixture
def plain() -> Iterator[CudaCalls]:
    """The launchers in the fastest build: for many calls that ask for results only."""
    for emulator in _of_mode(modes()[0]):
        yield CudaCalls(emulator.library, emulator.declare)
