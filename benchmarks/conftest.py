"""Lets `pytest benchmarks` find the `bench_*.py` files, and gives each benchmark one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    patterns = parent.config.getini("python_files")
    is_benchmark = file_path.match("bench_*.py")
    collected_anyway = parent.session.isinitpath(file_path) or any(map(file_path.match, patterns))
    if is_benchmark and not collected_anyway:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
