"""Tests for a machine with a GPU: `pytest tests/gpu -m gpu`.

Without one they are skipped. With VQKERNELS_GPU_DRY_RUN=1 the same tests run on CPU tensors and the
CPU's kernels (the reference where they are not built), so that only the device is new on the day
there is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vqkernels
from vqkernels import native
from vqkernels.backends import select

DRY_RUN = os.environ.get("VQKERNELS_GPU_DRY_RUN") == "1"
_STAND_IN = "cpu" if native.problem is None else "reference"
BACKENDS = (_STAND_IN,) if DRY_RUN else ("cuda", "triton")
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skipped = pytest.mark.skip(reason="needs a CUDA GPU (`make gpu-check`)")
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not DRY_RUN and not torch.cuda.is_available():
                item.add_marker(skipped)


@pytest.fixture
def device() -> str:
    return "cpu" if DRY_RUN else "cuda"


@pytest.fixture(params=BACKENDS)
def gpu_backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """Each backend of the GPU, in force during the test."""
    x = torch.empty(1, 16, device=device)
    yield from _in_force(request.param, "nearest_code", x, x)


@pytest.fixture(params=BACKENDS)
def attention_backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """The same for attention in half precision."""
    head = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    yield from _in_force(request.param, "attention", head, head, head)


@pytest.fixture(params=BACKENDS)
def modulation_backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """The same for the norm and the gated sum."""
    x = torch.empty(1, 1, 8, device=device)
    yield from _in_force(request.param, "ada_layer_norm", x, x[0], x[0])


@pytest.fixture(params=BACKENDS)
def noise_backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """The same for `diffuse` and `denoise_step`."""
    yield from _in_force(request.param, "denoise_step", torch.empty(1, 8, device=device))


def _in_force(backend: str, op: str, *tensors: torch.Tensor) -> Iterator[str]:
    with vqkernels.use_backend(backend):
        try:
            select(op, *tensors)
        except ValueError as error:
            pytest.skip(str(error))
        yield backend


@pytest.fixture(params=[_STAND_IN if DRY_RUN else "triton"])
def triton_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """For ops whose only kernels on a GPU are Triton's."""
    with vqkernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def only_cuda() -> None:
    """For what has no counterpart on the CPU."""
    if DRY_RUN:
        pytest.skip("the CPU has nothing of the kind")


@pytest.fixture(autouse=True)
def _no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
