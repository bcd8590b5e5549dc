"""`benchmarks.gpu_check` with the CPU in the GPU's place: stages, resuming, CSV, table."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import gpu_check
from benchmarks.case import OURS, Provider, Variant
from benchmarks.gpu import ceilings, measure, report, targets, worker
from benchmarks.gpu.cases import CASES, HALF, SMALL, LookupCase
from benchmarks.gpu.device import StandIn
from benchmarks.gpu.peers import FLASH, MATMUL
from benchmarks.gpu.timing import COLD, DRY, WARM
from benchmarks.records import FIELDS, Record, read_csv
from benchmarks.shapes import CodebookShape

ROOT = Path(__file__).parents[1]
SMALL_ROW = CodebookShape("small", 64, 24, 40, "l2", "a test")


def start(state: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--state", str(state)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=500)
    return process.returncode, printed


def outcomes(state: Path) -> dict[str, Any]:
    return json.loads((state / "dry-run.json").read_text())["outcomes"]


def test_an_interrupted_run_is_resumed(tmp_path: Path) -> None:
    items = "all,N65536 D64 K1024 l2 float16 gaussian,quantize target N65536 D8"
    stages = "environment,ceilings,bench-codebook-half,bench-quantizer,report"
    chosen = ["--stages", stages, "--items", items]
    first = start(tmp_path, *chosen)
    assert first.stdout is not None
    for line in first.stdout:
        if "ceilings/all" in line:
            break
    time.sleep(1.0)  # into the next item
    first.send_signal(signal.SIGTERM)
    code, printed = finish(first)
    assert code == 130
    assert "interrupted" in printed
    assert set(outcomes(tmp_path)) == {"environment/all", "ceilings/all"}
    assert {record.op for record in read_csv(tmp_path / "dry-run.csv")} == {"ceiling"}

    code, printed = finish(start(tmp_path, *chosen))
    log = (tmp_path / "dry-run.log").read_text()
    assert code == 0, log
    ended = Counter(line.split()[3] for line in log.splitlines() if line.startswith("done "))
    assert ended["environment/all:"] == 1
    assert ended["ceilings/all:"] == 1
    assert len(outcomes(tmp_path)) == 4

    with (tmp_path / "dry-run.csv").open(newline="") as file:
        assert csv.DictReader(file).fieldnames == list(FIELDS)
    records = read_csv(tmp_path / "dry-run.csv")
    rows = Counter((*record.row, record.provider) for record in records if record.op != "ceiling")
    assert set(rows.values()) == {1}
    assert {record.op for record in records} == {"ceiling", "nearest_code", "quantize"}
    lookups = [r for r in records if r.op == "nearest_code" and targets.is_ours(r)]
    assert {r.mode for r in lookups} == {COLD, WARM}
    assert all(r.timed and r.checked == 96 and not r.note for r in lookups)
    last = printed.split("\n\n")
    assert last[-2].startswith("Targets")
    assert "dry-run.csv" in last[-1]
    assert "no time means anything" in last[-1]
    assert "nearest_code: our best kernel's ms, warm L2" in printed


def test_build_tests_and_sanitizer_stages(tmp_path: Path) -> None:
    arguments = ["--stages", "build,tests,sanitizer", "--items", "all,behaviour,memcheck search"]
    code, printed = finish(start(tmp_path, *arguments, "--out", str(tmp_path / "out")))
    found = outcomes(tmp_path)
    log = (tmp_path / "out" / "dry-run.log").read_text()
    assert code == 0, log
    assert set(found) == {"build/all", "tests/test_gpu_behaviour.py", "sanitizer/memcheck search"}
    assert "0 failed" in found["tests/test_gpu_behaviour.py"]["note"]
    assert "test_gpu_behaviour" in log
    assert log == (tmp_path / "dry-run.log").read_text()
    assert "11 to do" in printed  # three tools over four parts, but one


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two stages of two items whose outcome is their name; returns what ran."""
    stages = tuple(
        gpu_check.Stage(name, "", ("done", "failed"), 100) for name in ("first", "second")
    )
    ran: list[str] = []

    def run_item(stage: Any, item: str, seconds: float, *rest: Any, **more: Any) -> dict[str, Any]:
        ran.append(f"{stage.name}/{item}")
        return {"status": item, "note": "", "records": [], "seconds": 0.0}

    monkeypatch.setattr(gpu_check, "stages", lambda dry: stages)
    monkeypatch.setattr(gpu_check, "run_item", run_item)
    monkeypatch.setattr(gpu_check, "device_name", lambda dry: "a device")
    return ran


def test_what_failed_runs_again_only_if_asked(fake_stages: list[str], tmp_path: Path) -> None:
    arguments = ["--state", str(tmp_path), "--out", str(tmp_path)]
    everything = ["first/done", "first/failed", "second/done", "second/failed"]
    assert gpu_check.main(arguments) == 1
    assert fake_stages == everything
    assert gpu_check.main(arguments) == 1
    assert fake_stages == everything
    assert gpu_check.main([*arguments, "--retry"]) == 1
    assert fake_stages[4:] == ["first/failed", "second/failed"]
    assert gpu_check.main([*arguments, "--restart", "--stages", "second", "--items", "done"]) == 0
    assert fake_stages[6:] == ["second/done"]


def test_time_that_is_up_leaves_the_rest(
    fake_stages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--state", str(tmp_path), "--out", str(tmp_path)]
    assert gpu_check.main([*arguments, "--seconds", "10"]) == 1
    assert fake_stages == []
    assert "no time left" in capsys.readouterr().out


def test_unknown_stages_and_no_gpu(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert gpu_check.main(["--stages", "benches"]) == 2
    assert "stages must be among environment" in capsys.readouterr().err
    assert gpu_check.main(["--list", "--stages", "tests"]) == 0
    assert "tests/gpu" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert gpu_check.main(["--state", str(tmp_path)]) == 2
        assert "no CUDA GPU; --dry-run" in capsys.readouterr().err


def test_an_item_that_takes_too_long_or_crashes(tmp_path: Path) -> None:
    log = gpu_check.Log(tmp_path / "log", tmp_path / "log")
    stage = gpu_check.Stage("environment", "", ("all",), 1)
    late = gpu_check.run_item(stage, "all", 0.2, log, dry=True, verbose=False)
    assert late["status"] == "failed"
    assert "took over" in late["note"]
    unknown = gpu_check.Stage(HALF, "", ("no such case",), 60)
    broken = gpu_check.run_item(unknown, "no such case", 60, log, dry=True, verbose=False)
    assert broken["status"] == "failed"
    assert "exit status 1" in broken["note"]
    assert "Traceback" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("dry", [False, True])
def test_stages_fit_their_limit(dry: bool) -> None:
    stages = gpu_check.stages(dry)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert gpu_check.STAGE_SECONDS < 540
    for stage in stages:
        assert stage.item_seconds <= gpu_check.STAGE_SECONDS
        assert stage.name == "report" or stage.items
        assert stage.name == "report" or stage.name in worker.RUN
    keys = [case.key for case in CASES]
    assert len(set(keys)) == len(keys)
    assert len({case.shrunk().key for case in CASES}) == len(keys)


@dataclass(frozen=True)
class PlantedCase(LookupCase):
    """Two more providers: one is wrong, one can run in one of two ways."""

    def providers(self, device: Any) -> tuple[Provider, ...]:
        def wrong(problem: Any) -> Any:
            return lambda: torch.cdist(problem.x, problem.codebook).argmax(-1)

        def right(problem: Any) -> Any:
            return lambda: torch.cdist(problem.x, problem.codebook).argmin(-1)

        def broken(problem: Any) -> Any:
            raise RuntimeError("planted\nand more")

        return (
            *super().providers(device),
            Provider("wrong", (Variant("", wrong),)),
            Provider("half broken", (Variant("a", broken), Variant("b", right))),
            Provider("broken", (Variant("", broken),)),
        )


def test_wrong_and_broken_providers_are_not_timed() -> None:
    case = PlantedCase(HALF, SMALL_ROW, "float32")
    records = measure.measure(case, StandIn(), DRY, {})
    by_provider = {record.provider: record for record in records if record.mode == WARM}
    assert "rows outside the rounding bound" in by_provider["wrong"].note
    assert by_provider["broken"].note == "failed: RuntimeError: planted"
    assert not by_provider["wrong"].timed
    assert not by_provider["broken"].timed
    assert by_provider["half broken"].config == "b, graph"
    assert by_provider[MATMUL].timed
    ours = by_provider[f"{OURS}-reference"]
    assert ours.checked == 64
    assert ours.floor_share == pytest.approx(ours.floor_ms / ours.ms_p50)
    assert "wrong: refused" in report.render(records)


def test_half_precision_scores_are_allowed_their_rounding_and_no_more() -> None:
    case = LookupCase(HALF, dataclasses.replace(SMALL_ROW, codebook_size=400), "bfloat16")
    problem = case.inputs(StandIn())
    scores = torch.cdist(problem.x.double(), problem.codebook.double())
    near = (scores.square() * (1 + 2.0**-9 * torch.randn(scores.shape))).argmin(-1)
    far = scores.argsort(-1)[:, 40]
    found = case.check(problem, {MATMUL: near, f"{OURS}-cuda": near}, StandIn())
    assert found[MATMUL].mismatches > 0
    assert found[MATMUL].refusal == ""
    assert found[f"{OURS}-cuda"].refusal
    assert case.check(problem, {MATMUL: far}, StandIn())[MATMUL].refusal


def test_floor_of_few_dimensions_is_the_epilogue() -> None:
    case = LookupCase(SMALL, dataclasses.replace(SMALL_ROW, dim=8), "float32")
    floor, note = measure.floor_ms(case, StandIn(), {})
    assert floor != floor
    assert "rates.cu" in note
    rate = ceilings.Ceiling("epilogue", "", "float32", 1e3, "scores/s", ())
    floor, note = measure.floor_ms(case, StandIn(), {"epilogue": rate})
    assert floor == pytest.approx(64 * 40)
    assert note == ""


def lookup(provider: str, ms: float, dim: int, size: int, dtype: str, **more: Any) -> Record:
    shape = f"N65536 D{dim} K{size} l2"
    fields = ("nearest_code", "target", shape, WARM, dtype, "gaussian", 1, provider)
    return Record(*fields, ms_p50=ms, samples=5, **more)


def verdicts(records: list[Record]) -> dict[str, targets.Verdict]:
    return {verdict.target.text: verdict for verdict in targets.judge(records)}


def test_targets_take_the_best_backend_and_the_worst_row() -> None:
    mma = Record("ceiling", "mma.sync", "", "", "float16", "", 1, "machine", note="600000 GFLOP/s")
    records = [
        mma,
        lookup(f"{OURS}-cuda", 0.10, 256, 1024, "float16", peak_mib=1.0),
        lookup(f"{OURS}-triton", 0.07, 256, 1024, "float16", peak_mib=1.0),
        lookup(FLASH, 0.10, 256, 1024, "float16"),
        lookup(f"{OURS}-cuda", 1.0, 256, 16384, "float16", peak_mib=100.0),
        lookup(f"{OURS}-cuda", 0.5, 256, 16384, "float32", peak_mib=300.0),
        lookup(MATMUL, 4.0, 256, 16384, "float32"),
        lookup(f"{OURS}-triton", 0.2, 8, 16384, "float32", floor_ms=0.08),
        lookup(MATMUL, 0.1, 8, 16384, "float32"),
    ]
    found = verdicts(records)
    flash = found["fp16, N = 65536, D = 256, K = 1024: at most 0.67x flash-kmeans"]
    assert flash.met is False
    assert flash.seen.value == pytest.approx(0.7)
    assert "triton" in str(flash)
    assert "measured" in str(flash)
    published = found["fp16, N = 65536, D = 256, K = 16384: at most 0.67x flash-kmeans"]
    assert published.seen.value == pytest.approx(1.0 / 1.394)
    assert "published for an H100" in str(published)
    assert found["fp16, N = 65536, D = 64, K = 1024: at most 0.5x flash-kmeans"].met is None
    share = found["halves, N = 65536: CUDA at least 0.85 of the mma.sync ceiling"]
    assert share.seen.value == pytest.approx(2 * 65536 * 256 * 1024 / 0.10e-3 / 6e14)
    assert share.met is False
    assert found["fp32, N = 65536: at most 0.25x matmul + argmin without TF32"].met is True
    floor = found["fp32, N = 65536, D = 8, K = 16384: at most 2x the epilogue floor"]
    assert floor.seen.value == pytest.approx(2.5)
    assert floor.met is False
    memory = found["memory: at most 1/8 of N x K halves"]
    assert memory.seen.value == pytest.approx(300 / 2048)
    assert memory.met is False
    assert found["results outside float64's bound, or failed"].met is True
    refused = Record(
        *("nearest_code", "target", "N8 D8 K8 l2", WARM, "float32", "gaussian", 1),
        f"{OURS}-cuda",
        note="refused: 1 of 8 rows",
    )
    wrong = verdicts([*records, refused])["results outside float64's bound, or failed"]
    assert wrong.met is False
    assert "refused" in str(wrong)


@pytest.mark.parametrize(
    ("body", "code", "status", "note"),
    [
        ('tests="3" failures="0" errors="0" skipped="1"', 0, "done", "2 passed, 0 failed"),
        ('tests="2" failures="1" errors="0" skipped="0"', 1, "failed", "1 passed, 1 failed, 0"),
        ('tests="5" failures="0" errors="0" skipped="5"', 0, "failed", "0 passed"),
    ],
)
def test_outcome_of_pytest(tmp_path: Path, body: str, code: int, status: str, note: str) -> None:
    path = tmp_path / "junit.xml"
    case = '<testcase name="test_a"><failure/></testcase>' if code else ""
    path.write_text(f"<testsuites><testsuite {body}>{case}</testsuite></testsuites>")
    outcome = worker._of_junit(path, code)
    assert outcome.status == status
    assert note in outcome.note
    assert ("test_a" in outcome.note) == bool(code)


def test_register_loops_compile_and_say_that_there_is_no_gpu(tmp_path: Path) -> None:
    library, why = ceilings.compile_rates(tmp_path, "90")
    if library is None:
        pytest.skip(why)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: gpu-check measures them")
    found, why = ceilings.register_rates(library)
    assert found == {}
    assert "CUDA error" in why
