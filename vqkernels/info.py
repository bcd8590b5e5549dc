"""`vqkernels info`: what is installed, what was built, and which kernels serve which op and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence

import torch

import vqkernels
from vqkernels import backends, native

_TABLE_PREFIX = "libvqkernels_cpu_"


def report(*, verbose: bool = False) -> str:
    """The text of `vqkernels info`.

    Args:
        verbose: for every op, what each backend says, instead of one line an op.
    """
    lines = [
        *_section("versions", _versions()),
        *_section("native CPU kernels", _native_kernels()),
        *_section("native CUDA kernels", _cuda_kernels()),
        *_section("GPU", _gpus()),
    ]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        rows = _explanations(device) if verbose else _choices(device)
        lines += _section(f"ops, float32 tensors on {device}", rows)
    if native.problem is not None:
        lines += _banner(native.problem)
    return "\n".join(lines)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report; always 0, since a package on its references works too.

    Args:
        arguments: what follows `vqkernels info` on the command line.
    """
    parser = argparse.ArgumentParser(
        prog="vqkernels info",
        description="Versions, what was built, and which kernels serve which op and why.",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say what each backend makes of each op"
    )
    print(report(verbose=parser.parse_args(arguments).verbose))
    return 0


def _section(title: str, rows: Iterator[tuple[str, str]]) -> list[str]:
    held = list(rows)
    width = max((len(name) for name, _ in held), default=0)
    return [title, *(f"  {name:<{width}}  {value}".rstrip() for name, value in held), ""]


def _versions() -> Iterator[tuple[str, str]]:
    yield "vqkernels", vqkernels.__version__
    yield "torch", torch.__version__
    yield "triton", _installed_version("triton")
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()


def _native_kernels() -> Iterator[tuple[str, str]]:
    built = built_tables()
    yield "status", "in use" if native.problem is None else f"NOT IN USE: {native.problem}"
    last_build = _last_build_problem()
    if last_build is not None:
        yield "last build", last_build
    yield "folder", str(native.DIRECTORY)
    yield "ops object", native.OPS_OBJECT.name if native.OPS_OBJECT.exists() else "missing"
    yield "instruction sets built", ", ".join(built) or "none"
    yield "of these, this processor runs", ", ".join(runnable_tables()) or "none"
    yield "instruction set in use", native.capability() or "none"
    yield "threads", f"{torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS)"
    for variable in ("VQKERNELS_BACKEND", "VQKERNELS_CPU_CAPABILITY"):
        if variable in os.environ:
            yield variable, os.environ[variable]


def built_tables() -> list[str]:
    """The instruction sets whose kernels were built."""
    found = native.DIRECTORY.glob(f"{_TABLE_PREFIX}*")
    return sorted(path.stem.removeprefix(_TABLE_PREFIX) for path in found)


def runnable_tables() -> list[str]:
    """Those of `built_tables()` that this processor has."""
    supported = native.capabilities()
    return [name for name in built_tables() if supported.get(name, False)]


def _cuda_kernels() -> Iterator[tuple[str, str]]:
    in_use = native.cuda_problem is None
    yield "CUDA status", "in use" if in_use else f"not in use: {native.cuda_problem}"
    last_build = _last_build_problem("cuda_problem")
    if last_build is not None and torch.version.cuda is not None:
        yield "last CUDA build", last_build
    yield "CUDA object", native.CUDA_OBJECT.name if native.CUDA_OBJECT.exists() else "missing"
    if in_use:
        yield "built for", native.cuda_targets


def _gpus() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        toolkit = torch.version.cuda or torch.version.hip
        reason = "this torch was built without CUDA" if toolkit is None else "torch finds none"
        yield "none", reason
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {memory}"


def _choices(device: str) -> Iterator[tuple[str, str]]:
    for op in _op_names():
        yield op, _choice(op, _example(device))


def _choice(op: str, tensor: torch.Tensor) -> str:
    explanation = backends.explain(op, tensor)
    if explanation.backend is None:
        try:
            return backends.select(op, tensor)
        except ValueError as error:
            return f"raises: {error}"
    passed_over = [
        f"{backend}: {explanation.reasons[backend]}" for backend in explanation.passed_over
    ]
    why = "; ".join(passed_over) or explanation.reasons[explanation.backend]
    return f"{explanation.backend:<10} {why}"


def _explanations(device: str) -> Iterator[tuple[str, str]]:
    for op in _op_names():
        explanation = backends.explain(op, _example(device))
        yield op, explanation.backend or "nothing"
        for backend, reason in explanation.reasons.items():
            yield "", f"{backend:<10} {reason}"


def _example(device: str) -> torch.Tensor:
    """Rows of a usual number and width: on a GPU the choice depends on both."""
    return torch.empty(4096, 64, device=device)


def _op_names() -> list[str]:
    return [name for name in vqkernels.ops.__all__ if name.islower()]


def _installed_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _last_build_problem(which: str = "problem") -> str | None:
    try:
        return native.last_build().get(which)
    except (OSError, ValueError) as error:
        return f"build.json cannot be read: {error}"


def _banner(problem: str) -> list[str]:
    bar = "=" * 78
    advice = [
        "To build them, with a C++ compiler and ninja at hand and torch installed before:",
        "  VQKERNELS_NATIVE=1 pip install --no-build-isolation --no-deps --force-reinstall .",
    ]
    return [
        bar,
        "NO NATIVE KERNELS: on the CPU every op runs on its slow PyTorch reference.",
        problem,
        *(() if native.OPS_OBJECT.exists() else advice),
        bar,
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
