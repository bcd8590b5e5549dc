"""The benchmark harness: its shapes, its checks and its one CSV schema."""

from __future__ import annotations

import csv
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import __main__ as command
from benchmarks import bench_vector_quantize as steps
from benchmarks import ceilings, machine, plot, report, shapes, suite, targets, timing, worker
from benchmarks.bench_nearest_code import PACKED_BEFORE, PACKING_INCLUDED, NearestCodeCase
from benchmarks.case import OURS, Provider, Variant, key
from benchmarks.checks import check_indices
from benchmarks.peers import Problem, nearest_code_peers
from benchmarks.records import FIELDS, Record, read_csv, write_csv

SMALL = shapes.CodebookShape("small", 48, 6, 32, "l2", "a test")
BUDGET = timing.Budget(seconds=0.0, min_rounds=2, sample_seconds=1e-5)
REQUIRED_FIELDS = {
    "op", "provider", "dtype", "shape", "mode", "ms_p20", "ms_p50", "ms_p80",
    "peak_mib", "device", "versions", "load_average",
}  # fmt: skip


def measure(case: NearestCodeCase) -> list[Record]:
    fma = ceilings.FmaRate(None, 1)
    return worker.measure(case, threads=1, budget=BUDGET, data="gaussian", fma=fma)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "MATMUL_SIZE", 64)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 2**16)


def wrong_everywhere(problem: Problem) -> torch.Tensor:
    return torch.cdist(problem.x, problem.codebook).argmax(-1)


def one_row_second_best(problem: Problem) -> torch.Tensor:
    order = torch.cdist(problem.x, problem.codebook).argsort(-1)
    indices = order[:, 0].clone()
    indices[7] = order[7, 1]
    return indices


def out_of_range(problem: Problem) -> torch.Tensor:
    return torch.full((problem.x.shape[0],), problem.codebook.shape[0])


def wrong_dtype(problem: Problem) -> torch.Tensor:
    return torch.cdist(problem.x, problem.codebook).argmin(-1).int()


@dataclass(frozen=True)
class PlantedCase(NearestCodeCase):
    """A nearest-code case with one more provider, "planted"."""

    planted: object = wrong_everywhere

    def providers(self) -> tuple[Provider, ...]:
        variant = Variant("", lambda problem: lambda: self.planted(problem))
        return (*super().providers(), Provider("planted", (variant,)))


def test_every_shape_is_valid() -> None:
    for row in shapes.CODEBOOK_SHAPES:
        assert min(row.tokens, row.dim, row.codebook_size, row.books) >= 1
        assert row.metric in ("l2", "dot", "cosine")
        assert row.tokens_cap is None or 0 < row.tokens_cap < row.tokens
        assert 4 * row.timed_tokens * row.codebook_size <= 2**30
        assert ("(of " in row.label) == (row.timed_tokens < row.tokens)
    for row in shapes.TRANSFORMER_SHAPES:
        assert row.hidden_size == row.num_heads * row.head_dim
    assert {row.name: row.codebook_size for row in shapes.SCALAR_QUANTIZER_SHAPES} == {
        "fsq-cosmos": 64000,
        "lfq": 2**18,
    }
    for row in shapes.NOISE_SHAPES:
        assert all(isinstance(getattr(torch, dtype), torch.dtype) for dtype in row.dtypes)


def test_shape_lookup_wants_one_row() -> None:
    assert shapes.codebook_shape("taming-f16", 16384).codebook_size == 16384
    with pytest.raises(KeyError, match="expected one"):
        shapes.codebook_shape("taming-f16")


def test_case_keys_are_unique_and_found() -> None:
    keys = [key(case) for case in suite.CASES]
    assert len(set(keys)) == len(keys)
    assert all(suite.find_case(key(case)) is case for case in suite.CASES)
    assert {case.op for case in suite.select_cases([], [], quick=True)} == set(suite.OPS)
    assert suite.select_cases(["nearest_code"], ["all"], quick=False)[-1].op == "nearest_code"
    with pytest.raises(ValueError, match="ops must be among"):
        suite.select_cases(["nearest_cod"], [], quick=False)
    with pytest.raises(ValueError, match="no case matches"):
        suite.select_cases([], ["no such model"], quick=False)


@pytest.mark.parametrize("mode", [PACKING_INCLUDED, PACKED_BEFORE])
@pytest.mark.parametrize("metric", ["l2", "dot", "cosine"])
def test_every_variant_of_every_peer_is_right(metric: str, mode: str) -> None:
    row = dataclasses.replace(SMALL, metric=metric)
    problem = NearestCodeCase(row, mode).inputs("clustered")
    for provider in nearest_code_peers(metric):
        if provider.name == "faiss":
            pytest.importorskip("faiss")
        for variant in provider.variants:
            indices = variant.bind(problem)()
            check = check_indices(problem.x, problem.codebook, metric, {variant.name: indices})
            assert check[variant.name].refusal == "", (provider.name, variant.name)


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        (wrong_everywhere, "outside the rounding bound"),
        (one_row_second_best, "1 of 48 rows outside the rounding bound"),
        (out_of_range, "48 indices outside 0..31"),
        (wrong_dtype, "expected int64"),
    ],
)
def test_a_wrong_provider_is_refused(planted: object, reason: str) -> None:
    records = measure(PlantedCase(SMALL, PACKING_INCLUDED, planted=planted))
    by_provider = {record.provider: record for record in records}
    assert not by_provider["planted"].timed
    assert by_provider["planted"].note.startswith("refused: ")
    assert reason in by_provider["planted"].note
    assert by_provider[OURS].timed
    assert by_provider["cdist"].timed
    assert reason in report.render(records)


def test_a_disputed_row_outside_the_sample_is_found() -> None:
    x, codebook = torch.randn(4000, 4), torch.randn(8, 4)
    right = torch.cdist(x, codebook).argmin(-1)
    for row in (17, 2048, 3999):
        wrong = right.clone()
        wrong[row] = (right[row] + 1) % 8
        checks = check_indices(x, codebook, "l2", {"right": right, "wrong": wrong})
        assert checks["right"].refusal == ""
        assert checks["wrong"].mismatches == 1
        assert checks["wrong"].refusal


def test_a_choice_within_rounding_is_a_mismatch_but_not_refused() -> None:
    codebook = torch.tensor([[1.0, 0.0], [1.0 + 2**-23, 0.0]])
    x = torch.zeros(5, 2)
    checks = check_indices(x, codebook, "l2", {"near": torch.ones(5, dtype=torch.int64)})
    assert checks["near"].mismatches == 5
    assert checks["near"].refusal == ""


def test_a_wrong_training_step_is_refused() -> None:
    case = steps.VectorQuantizeCase(dataclasses.replace(SMALL, tokens=64), 64)
    step = case.inputs("gaussian")
    result = case.keep(steps.bind_step(steps.our_layer(step), step)())
    checks = case.check(
        step,
        {
            OURS: result,
            "stale book": dataclasses.replace(result, codebook=step.codebook),
            "no gradient": dataclasses.replace(result, x_gradient=torch.zeros_like(step.x)),
            "wrong codes": dataclasses.replace(result, quantized=step.x),
        },
    )
    assert checks[OURS].refusal == ""
    assert "codebook differs" in checks["stale book"].refusal
    assert "x_gradient differs" in checks["no gradient"].refusal
    assert "quantized differs" in checks["wrong codes"].refusal


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_peer_step_follows_the_formulas(metric: str) -> None:
    pytest.importorskip("vector_quantize_pytorch")
    row = dataclasses.replace(SMALL, tokens=64, metric=metric)
    records = worker.measure(
        steps.VectorQuantizeCase(row, 64),
        threads=1,
        budget=BUDGET,
        data="gaussian",
        fma=ceilings.FmaRate(None, 1),
    )
    assert [(r.provider, r.note, r.timed) for r in records] == [
        (OURS, "", True),
        (steps.PEER, "", True),
    ]


def test_run_writes_the_schema_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.csv"
    arguments = ["--quick", "--ops", "nearest_code", "--shapes", "tiny", "--out", str(path)]
    assert command.main(arguments) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == set(FIELDS)
    assert REQUIRED_FIELDS.issubset(FIELDS)
    assert {row["name"] for row in rows if row["op"] == "ceiling"} == {"fma", "matmul", "copy"}
    ours = next(row for row in rows if row["provider"] == OURS)
    assert 0 < float(ours["ms_p20"]) <= float(ours["ms_p50"]) <= float(ours["ms_p80"])
    assert "torch" in ours["versions"]
    assert ours["mismatches"] == "0"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "overhead of a call: under 15 us (1 thread): seen" in printed
    assert "(1 thread): not measured" in printed


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--ops", "convolution"]) == 2
    assert "ops must be among" in capsys.readouterr().err
    assert command.main(["--threads", "1000"]) == 2
    assert "threads must be 1 to" in capsys.readouterr().err


def test_records_survive_the_csv(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    record = Record("op", "n", "N1 D8", "m", "float32", "", 2, OURS, ms_p50=0.125, samples=3)
    write_csv(path, [record])
    (again,) = read_csv(path)
    assert (again.ms_p50, again.samples, again.threads, again.note) == (0.125, 3, 2, "")
    assert math.isnan(again.ms_p20)
    assert again.timed


def test_picture_of_one_record(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fields = ("nearest_code", "n", "N1 D8 K2 l2", PACKING_INCLUDED, "float32", "gaussian", 1)
    rows = [Record(*fields, name, ms_p50=1.0, samples=1) for name in (OURS, "faiss", "unknown")]
    plot.plot(rows, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_targets_judge_the_worst_row() -> None:
    def row(name: str, shape: str, ours: float, faiss: float) -> list[Record]:
        fields = ("nearest_code", name, shape, PACKING_INCLUDED, "float32", "gaussian", 1)
        return [
            Record(*fields, OURS, ms_p50=ours, samples=5, floor_share=0.9),
            Record(*fields, "faiss", ms_p50=faiss, samples=5),
        ]

    records = row("a", "N9 D256 K9 l2", 0.8, 1.0) + row("b", "N9 D256 K99 l2", 0.95, 1.0)
    verdicts = {v.target.text: v for v in targets.judge(records)}
    faiss = verdicts["nearest_code, D = 256: at most 0.92x faiss"]
    assert faiss.passed is False
    assert faiss.seen == pytest.approx(0.95)
    assert "FAIL" in str(faiss)
    assert "b N9 D256 K99" in str(faiss)
    assert "repeat" not in str(faiss)
    disturbed = [dataclasses.replace(r, cores_busy_elsewhere=0.9) for r in records]
    assert "repeat" in "".join(map(str, targets.judge(disturbed)))
    share = verdicts["nearest_code, D >= 64: at least 0.85 of the fp32 FMA rate"]
    assert share.passed is True
    assert verdicts["nearest_code, overhead of a call: under 15 us"].passed is None


def test_peak_memory_sees_a_temporary() -> None:
    size = 32 * machine.MEBIBYTE

    def temporary() -> float:
        return float(torch.ones(size // 4).sum())

    result, peak = machine.with_peak_memory(temporary)
    if peak != peak:
        pytest.skip("this system has no resettable high-water mark")
    assert result == size // 4
    assert 31 <= peak <= 64
    assert machine.with_peak_memory(lambda: None)[1] < 4


def test_interleaving_takes_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    budget = timing.Budget(seconds=0.0, min_rounds=3, sample_seconds=0.0)
    timings = timing.interleave(calls, budget, expected_seconds=dict.fromkeys("abc", 1.0))
    assert "".join(order) == "abcbcacab"
    assert all(t.samples == 3 and t.p20 <= t.p50 <= t.p80 for t in timings.values())
    assert timing.quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert timing.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)


def test_fma_loop_beats_the_matrix_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ceilings.compile_fma_loop(tmp_path)
    if library is None:
        pytest.skip("no C compiler")
    rate = ceilings.FmaRate(library, 1)
    assert rate.source == "C loop"
    monkeypatch.setattr(ceilings, "MATMUL_SIZE", 256)
    assert rate.best > 0.5 * ceilings.matmul(torch.float32).rate
