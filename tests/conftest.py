from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import vqkernels
from vqkernels import native

pytest.register_assert_rewrite("_helpers.exact", "_helpers.quantizing")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "every_capability: run again under every instruction set of the processor"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that serves tensors on the CPU, in force during the test."""
    if request.param == "cpu" and native.problem is not None:
        pytest.skip(native.problem)
    with vqkernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def native_cpu() -> Iterator[None]:
    """The native CPU kernels, in force during the test."""
    if native.problem is not None:
        pytest.skip(native.problem)
    with vqkernels.use_backend("cpu"):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For files of many small calls; what threads change is tested by setting their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Puts the number of intra-op threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
