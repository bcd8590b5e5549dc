"""One table for all files here; it is printed after the tests. And the ops of the CUDA object over
emulated kernels, which a process loads once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _helpers.builds import ROOT, build_script, compile_with
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


@pytest.fixture(scope="session")
def ops(tmp_path_factory: pytest.TempPathFactory) -> torch._ops._OpNamespace:
    sys.path.append(str(ROOT / "tests/emulated"))
    import emulator

    script = build_script()
    try:
        compiler, (includes, _) = script["compiler"](), script["toolkit_paths"](script["nvcc"]())
        torch_directory = script["torch_directory"]()
    except script["NativeBuildError"] as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("ops")
    flags = ["-O1", "-fPIC", "-fvisibility=hidden", *script["ops_flags"](torch_directory).split()]
    flags += ["-DUSE_CUDA", "-DVQKERNELS_DISPATCH_KEY=CPU", '-DVQKERNELS_CUDA_TARGETS="none"']
    flags += [f"-isystem{path}" for path in includes]
    objects = []
    sources = [Path(__file__).with_name("cuda_ops_on_cpu.cpp")]
    for source in (*sources, *sorted((ROOT / "csrc/cuda/ops").glob("*.cpp"))):
        objects.append(folder / f"{source.stem}.o")
        compile_with(compiler, *flags, "-c", source, "-o", objects[-1])
    emulation, kernels = emulator.FLAGS["plain"]
    objects += [emulator.compiled(path, emulation) for path in emulator.emulation_sources()]
    objects += [
        emulator.compiled(path, [*emulator.OF_KERNELS, *kernels])
        for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))
    ]
    path = folder / "libcuda_ops_on_cpu.so"
    libraries = [f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-ldl", "-lpthread"]
    # -Bsymbolic: its own functions, not those of torch's libraries with the same names.
    compile_with(compiler, "-shared", "-Wl,-Bsymbolic", *objects, *libraries, "-o", path)
    torch.ops.load_library(str(path))
    return torch.ops.vqkernels_cuda
