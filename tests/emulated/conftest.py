from __future__ import annotations

from collections.abc import Iterator

import pytest
from cuda_calls import CudaCalls
from emulator import KERNELS, SELFTEST, Emulator, compiler, modes


@pytest.fixture(autouse=True, scope="session")
def _compiler() -> None:
    try:
        compiler()
    except FileNotFoundError as error:
        pytest.skip(str(error))


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


@pytest.fixture(scope="session")
def _fastest() -> Emulator:
    return Emulator(modes()[0], KERNELS)


@pytest.fixture
def plain(_fastest: Emulator) -> Iterator[CudaCalls]:
    """The launchers in the fastest build: for many calls that ask for results only."""
    _fastest.set_order("forward")
    yield CudaCalls(_fastest.library, _fastest.declare)
    _fastest.forget()
