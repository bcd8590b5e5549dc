from __future__ import annotations

import pytest
from emulator import SELFTEST, Emulator, modes


@pytest.fixture(params=modes(), scope="session")
def selftest(request: pytest.FixtureRequest) -> Emulator:
    """The kernels of emulation_selftest.cu, in each build that this process can load."""
    return Emulator(request.param, SELFTEST)


@pytest.fixture(scope="session")
def checked() -> Emulator:
    """The same in the build that finds every memory fault."""
    return Emulator("race", SELFTEST)
