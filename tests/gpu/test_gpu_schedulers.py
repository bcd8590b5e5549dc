"""Schedulers' loops on a GPU: the CPU's pictures, without a wait, and as one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from _helpers.data import generator
from torch import Tensor

from vqkernels import schedulers

NAMES = [name for name in schedulers.__all__ if name.endswith("Scheduler")]
every_class = pytest.mark.parametrize("name", NAMES)


def make(name: str, device: str) -> Any:
    noisy = name == "FlowMatchEulerDiscreteScheduler"
    scheduler = getattr(schedulers, name)(**({"stochastic_sampling": True} if noisy else {}))
    scheduler.set_timesteps(6, device=device)
    scheduler.begin_loop()
    return scheduler


def loop(scheduler: Any, x: Tensor, seed: Tensor) -> Tensor:
    """Every step, of a model that depends on t; noise, where there is any, is keyed."""
    for row, t in enumerate(scheduler.timesteps):
        output = torch.tanh(
            0.9 * scheduler.scale_model_input(x, t) + 0.2 * x.roll(1, -1) + t / 1000
        )
        x = scheduler.next_sample(x, output, row, seed=seed)
    return x


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU raises."""
    if device == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def start(device: str) -> Tensor:
    return torch.randn(3, 4, 16, 16, generator=generator(3)).to(device)


@every_class
def test_loops_are_those_of_the_cpu(name: str, device: str) -> None:
    x, seed = start("cpu"), torch.tensor(11)
    expected = loop(make(name, "cpu"), x, seed)
    found = loop(make(name, device), x.to(device), seed.to(device)).cpu()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@every_class
def test_steps_do_not_wait(name: str, device: str) -> None:
    scheduler, x, seed = make(name, device), start(device), torch.tensor(11, device=device)
    loop(scheduler, x, seed)  # what a first call sets up
    scheduler = make(name, device)
    with no_waiting(device):
        result = loop(scheduler, x, seed)
    assert result.isfinite().all()


@every_class
def test_a_loop_is_a_cuda_graph(name: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("CUDA graphs are a GPU's")
    scheduler, x, seed = make(name, device), start(device), torch.tensor(11, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loop(scheduler, x, seed)
    torch.cuda.current_stream().wait_stream(side)
    scheduler = make(name, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loop(scheduler, x, seed)
    for value in (11, 12):  # the seed is read when the graph runs
        seed.fill_(value)
        graph.replay()
        expected = loop(make(name, device), x, seed)
        assert torch.equal(captured, expected)
