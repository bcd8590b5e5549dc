"""Everything that a machine with a GPU has to show: `python -m benchmarks.gpu_check`.

Builds or finds the objects, runs the device tests, compute-sanitizer and the benchmarks, writes one
CSV and one log, and prints a short table last. It needs Python, torch, Triton and pytest, nvcc and
a C++ compiler where nothing was built before, and no network.

Work is cut into stages of under 9 minutes, and these into items that each run in a process of their
own. What an item found is kept at once: a run that is interrupted goes on with the first item that
has not ended when it is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from . import machine
from .records import Record, write_csv

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
STATE = ROOT / "build" / "gpu-check"
STAGE_SECONDS = 530
_INTERRUPTED = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Stage:
    name: str
    what: str
    items: tuple[str, ...]
    item_seconds: int


def stages(dry: bool) -> tuple[Stage, ...]:
    from .gpu.attention import ATTENTION
    from .gpu.cases import CASES, FP32, HALF, LAUNCHES, QUANTIZER, SMALL
    from .gpu.modulation import MODULATION
    from .gpu.noise import NOISE
    from .gpu.worker import sanitizer_items, test_items

    def cases(stage: str) -> tuple[str, ...]:
        return tuple(case.key for case in CASES if case.stage == stage)

    return (
        Stage("environment", "the GPU, its clocks, versions, tools", ("all",), 60),
        Stage("build", "take prebuilt objects, or build them", ("all",), 500),
        # Most of it compiles Triton kernels, which are cached: what is cut short ends sooner later.
        Stage("tests", "pytest tests/gpu -m gpu", test_items(dry), STAGE_SECONDS),
        Stage("sanitizer", "compute-sanitizer over a few small calls", sanitizer_items(dry), 120),
        Stage("ceilings", "copy, matrix products, register loops", ("all",), 120),
        Stage(HALF, "nearest_code, fp16 and bf16", cases(HALF), 150),
        Stage(FP32, "nearest_code, fp32", cases(FP32), 150),
        Stage(SMALL, "nearest_code, D <= 16", cases(SMALL), 150),
        Stage(LAUNCHES, "the CUDA search, launched in every way", cases(LAUNCHES), 120),
        Stage(QUANTIZER, "quantize with gradients, a training step", cases(QUANTIZER), 150),
        Stage(MODULATION, "adaLN, gates and GELU, with gradients", cases(MODULATION), 150),
        Stage(ATTENTION, "attention, with gradients", cases(ATTENTION), 150),
        Stage(NOISE, "noising, losses, sampler steps", cases(NOISE), 90),
        Stage("report", "the table", (), 0),
    )


class State:
    """Outcomes by "stage/item", kept in one file that is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.outcomes: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.outcomes = json.loads(path.read_text())["outcomes"]

    def keep(self, key: str, outcome: dict[str, Any]) -> None:
        self.outcomes[key] = outcome
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"outcomes": self.outcomes}, indent=1))
        partial.replace(self._path)

    def forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.outcomes.pop(key, None)

    def records(self, order: Sequence[str]) -> list[Record]:
        rows = (row for key in order for row in self.outcomes.get(key, {}).get("records", ()))
        return [Record(**row) for row in rows]


class Log:
    """Lines to the terminal and to files, each flushed at once."""

    def __init__(self, kept: Path, shown: Path) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shown.parent.mkdir(parents=True, exist_ok=True)
        before = kept.read_text() if kept.exists() else ""
        self._files: list[TextIO] = [sys.stdout, kept.open("a")]
        if shown != kept:
            shown.write_text(before)
            self._files.append(shown.open("a"))

    def line(self, text: str, *, terminal: bool = True) -> None:
        for file in self._files if terminal else self._files[1:]:
            file.write(text + "\n")
            file.flush()

    def close(self) -> None:
        for file in self._files[1:]:
            file.close()


def run_item(
    stage: Stage, item: str, seconds: float, log: Log, *, dry: bool, verbose: bool
) -> dict[str, Any]:
    """Runs one item in a process group of its own; what went wrong becomes its note."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "outcome.json"
        command = [sys.executable, "-m", "benchmarks.gpu.worker", stage.name, item]
        command += ["--out", str(out), *(["--dry-run"] if dry else [])]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": _python_path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        last = [""]

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                last[0] = line.strip() or last[0]
                log.line("    " + line.rstrip("\n"), terminal=verbose)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        outcome: dict[str, Any] = {"status": "failed", "records": []}
        try:
            code = process.wait(timeout=seconds)
            reader.join(timeout=10)
            if code == 0 and out.exists():
                outcome = json.loads(out.read_text())
            else:
                outcome["note"] = f"exit status {code}: {last[0][:300]}"
        except subprocess.TimeoutExpired:
            outcome["note"] = f"took over {seconds:.0f} s"
        finally:
            _end(process)
    return {**outcome, "seconds": round(time.monotonic() - begin, 1)}


def _end(process: subprocess.Popen[str]) -> None:
    """Ends what is left of the item's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def device_name(dry: bool) -> str:
    """Asked in a process of its own, so that this one holds nothing on the GPU."""
    code = f"from benchmarks.gpu.device import open_device; print(open_device({dry}).name())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": _python_path()},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout.strip().splitlines()[-1]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=(__doc__ or "").split("\n\n")[1],
    )
    parser.add_argument("--list", action="store_true", help="show the stages and stop")
    parser.add_argument("--stages", default="", help="comma-separated; default all")
    parser.add_argument("--items", default="", help="comma-separated parts of item names")
    parser.add_argument("--restart", action="store_true", help="forget what was found before")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop in time; run again to go on"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="the CPU in the GPU's place, on tiny shapes"
    )
    parser.add_argument("--verbose", action="store_true", help="the log on the terminal too")
    parser.add_argument("--out", type=Path, help="folder of the CSV and the log")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of what is resumed from")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    every = stages(options.dry_run)
    names = [word.strip() for word in options.stages.split(",") if word.strip()]
    unknown = [name for name in names if name not in {stage.name for stage in every}]
    if unknown:
        known = ", ".join(stage.name for stage in every)
        print(f"stages must be among {known}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    chosen = [stage for stage in every if not names or stage.name in names]
    if options.list:
        for stage in chosen:
            print(f"{stage.name:<22} {stage.what} ({len(stage.items)} items)")
        return 0
    try:
        device = device_name(options.dry_run)
    except RuntimeError as error:
        print(f"gpu-check: {error}; --dry-run runs every stage on the CPU", file=sys.stderr)
        return 2
    before = {number: signal.signal(number, _interrupt) for number in _INTERRUPTED}
    try:
        return check(options, device, chosen, every)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def check(
    options: argparse.Namespace, device: str, chosen: Sequence[Stage], every: Sequence[Stage]
) -> int:
    stem = machine.file_stem(device)
    out = options.out or (options.state if options.dry_run else RESULTS)
    csv, kept_log = out / f"{stem}.csv", options.state / f"{stem}.log"
    state_path = options.state / f"{stem}.json"
    if options.restart:
        state_path.unlink(missing_ok=True)
        kept_log.unlink(missing_ok=True)
    state = State(state_path)
    if options.retry:
        failed = (key for key, o in state.outcomes.items() if o["status"] == "failed")
        state.forget(list(failed))
    log = Log(kept_log, out / f"{stem}.log")
    order = [f"{stage.name}/{item}" for stage in every for item in stage.items]
    log.line(f"gpu-check on {device}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
    interrupted = False
    try:
        _run_stages(options, chosen, state, log, csv, order)
    except KeyboardInterrupt:
        interrupted = True
        log.line("interrupted: start again to go on from here")
    _conclude(chosen, state, log, csv, order)
    if options.dry_run:
        log.line("a dry run: the CPU stood in for the GPU, and no time means anything")
    log.close()
    wanted = [f"{stage.name}/{item}" for stage in chosen for item in stage.items]
    ended = [state.outcomes[key]["status"] for key in wanted if key in state.outcomes]
    if interrupted:
        return 130
    complete = bool(options.items) or len(ended) == len(wanted)
    return 0 if complete and "failed" not in ended else 1


def _run_stages(
    options: argparse.Namespace,
    chosen: Sequence[Stage],
    state: State,
    log: Log,
    csv: Path,
    order: Sequence[str],
) -> None:
    begin = time.monotonic()
    parts = [part.strip() for part in options.items.split(",") if part.strip()]
    for stage in chosen:
        stage_begin = time.monotonic()
        for item in stage.items:
            key = f"{stage.name}/{item}"
            if key in state.outcomes or (parts and not any(part in item for part in parts)):
                continue
            now = time.monotonic()
            left = min(STAGE_SECONDS - (now - stage_begin), options.seconds - (now - begin))
            if left < min(stage.item_seconds, 30):
                log.line(f"{stage.name}: no time left for {item}; start again to go on")
                break
            log.line(f"{stage.name}: {item}", terminal=options.verbose)
            seconds = min(stage.item_seconds, left)
            outcome = run_item(
                stage, item, seconds, log, dry=options.dry_run, verbose=options.verbose
            )
            out_of_time = seconds < stage.item_seconds and outcome.get("note", "").startswith(
                "took over"
            )
            if out_of_time:
                log.line(f"{stage.name}: {item} cut short; start again to go on")
                break
            state.keep(key, outcome)
            log.line(_said(key, outcome))
            write_csv(csv, state.records(order))


def _said(key: str, outcome: dict[str, Any]) -> str:
    note = outcome.get("note", "")
    return (
        f"{outcome['status']:<8} {outcome['seconds']:>6.1f} s  {key}{f': {note}' if note else ''}"
    )


def _conclude(
    chosen: Sequence[Stage], state: State, log: Log, csv: Path, order: Sequence[str]
) -> None:
    from .gpu.report import render

    records = state.records(order)
    if records:
        write_csv(csv, records)
    log.line("")
    for stage in chosen:
        keys = [f"{stage.name}/{item}" for item in stage.items]
        ended = [state.outcomes[key] for key in keys if key in state.outcomes]
        counts = [
            f"{count} {word}"
            for word in ("done", "failed", "skipped")
            if (count := sum(outcome["status"] == word for outcome in ended))
        ]
        open_items = len(keys) - len(ended)
        counts += [f"{open_items} to do"] if open_items else []
        if keys:
            log.line(f"{stage.name:<22} {', '.join(counts)}")
        for key in keys:
            outcome = state.outcomes.get(key)
            if outcome is not None and outcome["status"] != "done":
                log.line("  " + _said(key, outcome))
    log.line("\n" + render(records))
    log.line(f"\n{csv}\n{csv.with_suffix('.log')}")


if __name__ == "__main__":
    sys.exit(main())
