"""Runs one item of one stage in a process of its own, and writes what came out as JSON.

`python -m benchmarks.gpu.worker STAGE ITEM --out FILE` is started by `benchmarks.gpu_check`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.ceilings import Ceiling
from benchmarks.records import Record

from . import ceilings, measure
from .cases import CASES, find_case
from .device import open_device
from .sanitize import PARTS
from .timing import DRY, FULL

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "gpu"
RATES = ROOT / "build" / "gpu-check"
SANITIZERS = ("memcheck", "racecheck", "initcheck")
HALVES = (torch.float16, torch.bfloat16)
DONE, FAILED, SKIPPED = "done", "failed", "skipped"
DRY_RUN = "VQKERNELS_GPU_DRY_RUN"


@dataclass
class Outcome:
    """`note` is one line for the summary; `records` go into the CSV."""

    status: str
    note: str = ""
    records: list[Record] = field(default_factory=list)


def _run(command: Sequence[str], **environment: str) -> int:
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode


def environment(item: str, dry: bool) -> Outcome:
    """Versions, the GPU's properties and clocks; fails where there is no GPU."""
    device = open_device(dry)
    print(f"python {platform.python_version()} on {platform.platform()}")
    print(measure.versions())
    for tool, arguments in (("nvidia-smi", []), ("nvidia-smi", ["-q", "-d", "CLOCK,POWER"])):
        if shutil.which(tool):
            _run([tool, *arguments])
        else:
            print(f"{tool}: not found")
    for tool in ("nvcc", "g++", "ninja", "compute-sanitizer"):
        print(f"{tool}: {shutil.which(tool) or 'not found'}")
    if not dry:
        print(torch.cuda.get_device_properties(0))
    return Outcome(DONE, f"{device.name()}; {measure.versions()}")


def build(item: str, dry: bool) -> Outcome:
    """Takes the objects that lie in vqkernels/lib, or builds them."""
    wanted, kind = ("cpu", "cpu") if dry else ("cuda", "cuda")
    how = "prebuilt"
    if _refusal_in_a_fresh_process(wanted, kind):
        how = "built here"
        flags = {"VQKERNELS_CUDA": "auto"} if dry else {"VQKERNELS_CUDA": "1"}
        _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], **flags)
    reason = _refusal_in_a_fresh_process(wanted, kind)
    library = ROOT / "vqkernels" / "lib"
    for path in sorted(library.glob("*")):
        print(f"{path.stat().st_size:>10}  {path.name}")
    _run([sys.executable, "-m", "vqkernels", "info", "--verbose"])
    triton = "" if dry else f"; triton: {_refusal_in_a_fresh_process('triton', kind) or 'serves'}"
    if reason:
        return Outcome(FAILED, f"no {wanted} kernels: {reason}{triton}")
    return Outcome(DONE, f"{wanted} kernels: {how}{triton}")


def _refusal_in_a_fresh_process(backend: str, kind: str) -> str:
    """Objects load when the package is imported: what a build changed shows in a new process."""
    code = f"from benchmarks.gpu.device import refusal; print(refusal({backend!r}, {kind!r}))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return done.stdout.strip()


def test_items(dry: bool) -> tuple[str, ...]:
    """The files of tests/gpu; on a GPU each twice, so that a crash of one backend's kernels, which
    ends the process' use of the GPU, leaves the other's tests alone."""
    files = sorted(path.name for path in TESTS.glob("test_*.py"))
    suffixes = ("",) if dry else (" cuda", " triton")
    return tuple(f"{file}{suffix}" for file in files for suffix in suffixes)


def tests(item: str, dry: bool) -> Outcome:
    """One item of `test_items`; those without a backend run beside CUDA's."""
    file, _, backend = item.partition(" ")
    chosen = {"": [], "cuda": ["-k", "not triton"], "triton": ["-k", "triton"]}[backend]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "junit.xml"
        command = [sys.executable, "-m", "pytest", str(TESTS / file), "-m", "gpu", "-rs", "-q"]
        command += [*chosen, "-p", "no:cacheprovider", "--durations=5", f"--junitxml={report}"]
        code = _run(command, **({DRY_RUN: "1"} if dry else {}))
        if not report.exists():
            return Outcome(FAILED, f"pytest ended with {code} and no report")
        return _of_junit(report, code)


def _of_junit(report: Path, code: int) -> Outcome:
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    note = f"{passed} passed, {bad} failed, {counts['skipped']} skipped"
    names = [
        case.get("name", "")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if names:
        note += f": {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
    return Outcome(DONE if code == 0 and passed else FAILED, note)


def sanitizer_items(dry: bool) -> tuple[str, ...]:
    """A tool over one part of benchmarks.gpu.sanitize each, on a GPU by one backend: what compiles
    nothing first."""
    calls = PARTS if dry else [f"{part} {name}" for name in ("cuda", "triton") for part in PARTS]
    return tuple(f"{tool} {call}" for tool in SANITIZERS for call in calls)


def sanitizer(item: str, dry: bool) -> Outcome:
    """One of `sanitizer_items`, with every tensor an allocation of its own."""
    name, *call = item.split()
    script = [sys.executable, "-m", "benchmarks.gpu.sanitize", *call]
    script += ["--dry-run"] if dry else []
    tool = shutil.which("compute-sanitizer")
    if dry:
        code = _run(script)
        return Outcome(DONE if code == 0 else FAILED, "dry run: the script without the tool")
    if tool is None:
        tool = shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return Outcome(SKIPPED, "compute-sanitizer was not found")
    command = [tool, "--tool", name, "--error-exitcode", "9", *script]
    code = _run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    notes = {0: "nothing found", 9: f"{name} found errors: see the log"}
    return Outcome(DONE if code == 0 else FAILED, notes.get(code, f"exit status {code}"))


def machine_ceilings(item: str, dry: bool) -> Outcome:
    device = open_device(dry)
    found = [ceilings.copy(device)]
    found += [ceilings.matmul(device, dtype) for dtype in ceilings.DTYPES]
    missing = []
    registers, why = _register_rates(dry)
    found += registers.values()
    missing += [f"epilogue and fma: {why}"] if why else []
    try:
        found += map(ceilings.mma_sync, HALVES)
    except RuntimeError as error:
        missing.append(f"mma.sync: {error}")
    for ceiling in found:
        rate = f"{ceiling.rate / 1e9:.6g} G{ceiling.unit}"
        print(f"{ceiling.name} {ceiling.dtype} ({ceiling.shape}): {rate}", flush=True)
    note = "without " + "; ".join(missing) if missing else ""
    return Outcome(DONE, note, measure.ceiling_records(found, device))


def _register_rates(dry: bool) -> tuple[dict[str, Ceiling], str]:
    if dry:
        return {}, "they need a GPU"
    major, minor = torch.cuda.get_device_capability()
    library, why = ceilings.compile_rates(RATES, f"{major}{minor}")
    return ceilings.register_rates(library) if library is not None else ({}, why)


def bench(item: str, dry: bool) -> Outcome:
    case = find_case(item)
    if dry:
        case = case.shrunk()
    device = open_device(dry)
    rates, _ = _register_rates(dry)
    records = measure.measure(case, device, DRY if dry else FULL, rates)
    for record in records:
        shown = f"{record.ms_p50:.4f} ms" if record.timed else record.note
        print(f"{record.provider:<24} {record.mode:<8} {shown} {record.config}", flush=True)
    ours = [record for record in records if record.provider.startswith("vqkernels")]
    broken = sorted({f"{r.provider} {r.note}" for r in ours if not r.timed})
    if not ours:
        return Outcome(FAILED, "none of our kernels serves this device", records)
    return Outcome(FAILED if broken else DONE, "; ".join(broken), records)


RUN: dict[str, Callable[[str, bool], Outcome]] = {
    "environment": environment,
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "ceilings": machine_ceilings,
    **{case.stage: bench for case in CASES},
}


def _end_with_parent(parent: int) -> None:
    """Ends this process group when the parent is gone, so that a killed run leaves the GPU free."""
    while os.getppid() == parent:
        time.sleep(1.0)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="one item of a stage; started by gpu_check")
    parser.add_argument("stage", choices=RUN)
    parser.add_argument("item")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    outcome = RUN[options.stage](options.item, options.dry_run)
    records = [vars(record) for record in outcome.records]
    text = json.dumps({"status": outcome.status, "note": outcome.note, "records": records})
    options.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
