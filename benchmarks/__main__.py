"""Compares vqkernels with its peers: `python -m benchmarks --quick`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import machine, report
from .bench_nearest_code import DATA
from .case import OURS, Case, key
from .ceilings import compile_fma_loop
from .plot import plot
from .records import Record, write_csv
from .suite import OPS, select_cases

RESULTS = Path(__file__).with_name("results")
ROOT = Path(__file__).parents[1]
CASE_TIMEOUT_SECONDS = 600

Work = Sequence[tuple[Case | None, int]]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times vqkernels and its peers, interleaved, and checks their results first. "
        "Prints tables, and writes a CSV and a picture.",
    )
    parser.add_argument("--ops", default="", help=f"comma-separated among {', '.join(OPS)}")
    parser.add_argument("--shapes", default="", help="comma-separated parts of row names, or `all`")
    parser.add_argument(
        "--threads", default="", help="comma-separated; default 1 and 2, only 1 with --quick"
    )
    parser.add_argument("--quick", action="store_true", help="a few rows of each op, few samples")
    parser.add_argument("--data", choices=DATA, default=DATA[0])
    parser.add_argument("--name", default="", help="added to the name of the CSV, as of some ops")
    parser.add_argument("--out", type=Path, help="the CSV; the picture goes beside it")
    return parser.parse_args(arguments)


def run_worker(
    case: Case | None, threads: int, options: argparse.Namespace, library: Path | None
) -> list[Record]:
    """Measures one case (or the ceilings) in a fresh process; what went wrong becomes a note."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "records.json"
        command = [sys.executable, "-m", "benchmarks.worker", "--threads", str(threads)]
        command += ["--data", options.data, "--out", str(out)]
        command += ["--case", key(case)] if case is not None else []
        command += ["--quick"] if options.quick else []
        command += ["--fma-library", str(library)] if library is not None else []
        try:
            result = subprocess.run(
                command,
                cwd=ROOT,
                env=machine.thread_environment(threads),
                stderr=subprocess.PIPE,
                text=True,
                timeout=CASE_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return [_failed(case, threads, f"took over {CASE_TIMEOUT_SECONDS} s")]
        if result.returncode != 0:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            return [_failed(case, threads, f"exit status {result.returncode}: {last}")]
        return [Record(**row) for row in json.loads(out.read_text())]


def _failed(case: Case | None, threads: int, reason: str) -> Record:
    if case is None:
        return Record("ceiling", "none", "", "", "", "", threads, "machine", note=reason)
    return Record(
        case.op, case.name, case.shape, case.mode, case.dtype, "", threads, OURS, note=reason
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        cases = select_cases(_words(options.ops), _words(options.shapes), quick=options.quick)
        threads = [int(word) for word in _words(options.threads)]
    except ValueError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    cores = machine.usable_cores()
    threads = threads or ([1] if options.quick or cores == 1 else [1, 2])
    if not all(1 <= count <= cores for count in threads):
        print(f"python -m benchmarks: threads must be 1 to {cores}, got {threads}", file=sys.stderr)
        return 2

    device = machine.device_name()
    parts = (machine.file_stem(device), options.name, "quick" if options.quick else "")
    stem = "-".join(filter(None, parts))
    path = options.out or RESULTS / f"{stem}.csv"
    print(f"{device}; load average {machine.load_average():.2f}")
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as directory:
        library = compile_fma_loop(Path(directory))
        if library is None:
            print("no C compiler: the fp32 ceiling is PyTorch's sgemm")
        work = [(case, count) for count in threads for case in (None, *cases)]
        for case, count in with_progress(work):
            records += run_worker(case, count, options, library)
            write_csv(path, records)
    print(report.render(records))
    print(f"\n{path}")
    try:
        plot(records, path.with_suffix(".png"))
        print(path.with_suffix(".png"))
    except ImportError as error:
        print(f"no picture: {error.name} is not installed")
    return 1 if any(r.provider == OURS and not r.timed for r in records) else 0


def with_progress(work: Work) -> Iterator[tuple[Case | None, int]]:
    """The rows to measure, behind a progress bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from work
        return
    with tqdm(total=len(work), unit="row", dynamic_ncols=True) as bar:
        for case, count in work:
            bar.set_description(f"{case.name if case else 'ceilings'} x{count}")
            yield case, count
            bar.update()


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    sys.exit(main())
