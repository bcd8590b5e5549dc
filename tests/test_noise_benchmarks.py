"""The benchmarks of noising, losses and samplers: what they time is right, and wrong is refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import coefficient_error, targets
from benchmarks.bench_modulation import EAGER, FRESH, REUSED
from benchmarks.bench_noise import DIFFUSERS, DiffuseCase, LossCase
from benchmarks.bench_scheduler_step import LoopCase, OpCase, StepCase
from benchmarks.case import OURS
from benchmarks.records import Record
from benchmarks.samplers import SAMPLERS

SIZE = (3, 4, 16, 16)
DTYPES = ("float32", "bfloat16")


def first_outputs(case: Any, inputs: Any, *, compiled: bool = False) -> dict[str, Any]:
    """Of every provider's first variant; torch.compile's takes seconds."""
    providers = [p for p in case.providers() if compiled or p.name != "torch.compile"]
    return {p.name: case.keep(p.variants[0].bind(inputs)()) for p in providers}


def refusals(case: Any, inputs: Any, outputs: dict[str, Any]) -> dict[str, str]:
    return {name: check.refusal for name, check in case.check(inputs, outputs).items()}


@pytest.mark.parametrize("memory", [REUSED, FRESH])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [DiffuseCase, LossCase])
def test_noising_providers_are_right(case: Any, dtype: str, memory: str) -> None:
    pytest.importorskip("diffusers")
    row = case("small", SIZE, dtype, memory)
    inputs = row.inputs("gaussian")
    found = refusals(row, inputs, first_outputs(row, inputs))
    assert set(found) == {OURS, EAGER} | ({DIFFUSERS} if case is DiffuseCase else set())
    assert not any(found.values()), found


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_noising_is_refused(dtype: str) -> None:
    row = DiffuseCase("small", SIZE, dtype)
    inputs = row.inputs("gaussian")
    x_t, v = first_outputs(row, inputs)[OURS]
    found = refusals(
        row,
        inputs,
        {
            OURS: [x_t, v],
            "swapped": [v, x_t],
            "no noise": [inputs.x0, torch.zeros_like(v)],
            "flow target": [x_t, inputs.noise.to(v.dtype) - inputs.x0],
            "wide noise": [inputs.x0, 3 * inputs.noise.to(v.dtype)],
        },
    )
    assert found.pop(OURS) == ""
    assert all(found.values()), found
    # Normal, and yet not those of the key.
    assert refusals(row, inputs, {OURS: first_outputs(row, inputs)[EAGER]})[OURS]


def test_a_wrong_loss_is_refused() -> None:
    row = LossCase("small", SIZE, "float32")
    inputs = row.inputs("gaussian")
    losses, grad = first_outputs(row, inputs)[OURS]
    assert refusals(row, inputs, {OURS: [losses, 1.001 * grad]})[OURS].startswith("result 1")
    assert refusals(row, inputs, {OURS: [losses.flip(0), grad]})[OURS].startswith("result 0")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_steps_follow_the_papers(sampler: str, dtype: str) -> None:
    pytest.importorskip("diffusers")
    row = StepCase("small", SIZE, dtype, sampler=sampler)
    inputs = row.inputs("gaussian")
    outputs = first_outputs(row, inputs)
    found = refusals(row, inputs, outputs)
    assert set(found) == {OURS, DIFFUSERS}
    assert not any(found.values()), found
    # Of another row, nearly: a step is at most some percent of the sample.
    changed = {name: [1.1 * output[0]] for name, output in outputs.items()}
    assert all(refusals(row, inputs, changed).values())


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_step_is_called_again_from_the_same_state(sampler: str) -> None:
    pytest.importorskip("diffusers")
    row = StepCase("small", SIZE, "float32", sampler=sampler)
    inputs = row.inputs("gaussian")
    for bind in (row.bind_ours, row.bind_diffusers):
        call = bind(inputs)
        torch.manual_seed(3)
        first = row.keep(call())
        for _ in range(2):
            torch.manual_seed(3)
            assert torch.equal(call()[0], first[0])


@pytest.mark.parametrize("sampler", [name for name, what in SAMPLERS.items() if not what.guided])
def test_loops_agree(sampler: str) -> None:
    pytest.importorskip("diffusers")
    row = LoopCase("small", SIZE, "float32", sampler=sampler)
    inputs = row.inputs("gaussian")
    found = refusals(row, inputs, first_outputs(row, inputs))
    assert found == {OURS: "", DIFFUSERS: ""}


@pytest.mark.parametrize("memory", [REUSED, FRESH])
@pytest.mark.parametrize("sampler", ["DDIM", "flow Euler"])
def test_the_op_alone(sampler: str, memory: str) -> None:
    row = OpCase("small", SIZE, "float32", memory, sampler=sampler)
    inputs = row.inputs("gaussian")
    assert refusals(row, inputs, first_outputs(row, inputs)) == {OURS: "", EAGER: ""}


def test_compiled_steps_are_right() -> None:
    row = StepCase("small", SIZE, "float32", sampler="guided DDPM")
    inputs = row.inputs("gaussian")
    found = refusals(row, inputs, first_outputs(row, inputs, compiled=True))
    assert found["torch.compile"] == ""


def test_targets_of_noise() -> None:
    def row(op: str, mode: str, ours: float, peers: dict[str, float]) -> list[Record]:
        fields = (op, "n", "10x10x10 float32", mode, "float32", "gaussian", 1)
        mine = Record(*fields, OURS, ms_p50=ours, samples=5, floor_share=0.9)
        return [mine, *(Record(*fields, p, ms_p50=ms, samples=5) for p, ms in peers.items())]

    records = [
        *row("diffuse", REUSED, 5e-4, {DIFFUSERS: 3e-3}),
        *row("diffuse", FRESH, 5e-2, {DIFFUSERS: 3e-3}),
        *row("scheduler_step", f"UniPC, {REUSED}", 1.0, {DIFFUSERS: 6.5}),
        *row("scheduler_step", f"DPM++ 2M, {REUSED}", 1.0, {DIFFUSERS: 7.5}),
        *row("denoise_step", f"DDIM, {REUSED}", 1.0, {}),
        *row("sampling_loop", f"Euler, {REUSED}", 1.0, {DIFFUSERS: 9.0}),
    ]
    verdicts = {v.target.text: v for v in targets.judge(records)}
    expected = {
        "diffuse, float32: at least 7x as fast as diffusers": (False, 1 / 6),
        "diffuse, bfloat16: at least 8x as fast as diffusers": (None, None),
        "diffuse: at most 0.62 ns an element": (True, 0.5),
        "DPM++ 2M and UniPC step: at least 6x as fast as diffusers": (True, 1 / 6.5),
        "guided DDPM step: at least 9x as fast as diffusers": (None, None),
        "denoise_step, float32: at least 0.85 of the copy rate": (True, 0.9),
        "50-step loop: at least 10x as fast as diffusers": (False, 1 / 9),
    }
    for text, (passed, seen) in expected.items():
        assert verdicts[text].passed is passed, text
        assert verdicts[text].seen == (seen and pytest.approx(seen)), text


def test_rows_know_their_size() -> None:
    row = DiffuseCase("small", SIZE, "bfloat16")
    assert (row.elements, row.bytes_moved) == (3072, 3 * 2 * 3072.0)
    assert dataclasses.replace(row, dtype="float32").bytes_moved == 3 * 4 * 3072.0


def test_weights_in_bf16_are_as_the_docs_say(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("diffusers")
    lost = {"linear": 10, "scaled_linear": 2, "squaredcos_cap_v2": 21}
    for schedule, count in lost.items():
        for weight in coefficient_error.WEIGHTS:
            exact, ours, theirs = coefficient_error.errors(schedule, weight)
            assert float(ours.max()) < 0.0039
            without = (theirs == 1).nonzero().flatten().tolist()
            assert without == (list(range(count)) if weight == "noise" else [])
            assert exact.diff().sign().unique().tolist() == [1.0 if weight == "noise" else -1.0]
    coefficient_error.main([])
    assert "without any noise: ours 0, diffusers 21 timesteps" in capsys.readouterr().out
    # The page has the numbers of today's diffusers.
    page = (Path(__file__).parents[1] / "docs" / "noise.md").read_text()
    assert "| timesteps without noise | | 0 | 10 | | 0 | 2 | | 0 | 21 |" in page


def test_a_picture_of_weights(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    coefficient_error.main([str(tmp_path / "weights.png")])
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
