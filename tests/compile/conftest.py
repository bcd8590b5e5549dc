"""One table for all files here; it is printed after the tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from resource_table import TABLE, WRITES

# A process for another Triton leaves what it saw to the one that started it.
_LEAVES_IT_TO = os.environ.get("VQKERNELS_RESOURCES_SEEN")


def pytest_sessionfinish() -> None:
    if _LEAVES_IT_TO is not None:
        Path(_LEAVES_IT_TO).write_text(json.dumps(list(TABLE.seen.values())))
    elif WRITES:
        TABLE.write()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TABLE.seen and _LEAVES_IT_TO is None:
        terminalreporter.section("resources of the GPU kernels")
        for line in TABLE.lines():
            terminalreporter.write_line(line)
