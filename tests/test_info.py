from __future__ import annotations

import json
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch
from _helpers.processes import PACKAGE, output_of, run_python

import vqkernels
from vqkernels import backends, info, native

needs_native = pytest.mark.skipif(native.problem is not None, reason=str(native.problem))


def value(report: str, name: str) -> str:
    """What the report's line for `name` says."""
    found = re.findall(rf"^  {re.escape(name)}  +(.*)$", report, re.MULTILINE)
    assert len(found) == 1, f"{name} is in {len(found)} lines of\n{report}"
    return found[0]


def without_lib(folder: Path) -> Path:
    """A copy of the package that has no native objects."""
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    return Path(shutil.copytree(PACKAGE, folder / "vqkernels", ignore=ignored))


def test_versions_and_threads() -> None:
    report = info.report()
    assert value(report, "vqkernels") == vqkernels.__version__
    assert value(report, "torch") == torch.__version__
    assert value(report, "python").startswith(platform.python_version())
    assert value(report, "threads").startswith(f"{torch.get_num_threads()} ")


@needs_native
def test_what_was_built_and_what_runs() -> None:
    report = info.report()
    assert value(report, "status") == "in use"
    assert value(report, "instruction set in use") == native.capability()
    built = value(report, "instruction sets built").split(", ")
    runnable = value(report, "of these, this processor runs").split(", ")
    assert "portable" in built
    assert {"portable", native.capability()} <= set(runnable) <= set(built)
    assert "NO NATIVE KERNELS" not in report


@needs_native
@pytest.mark.parametrize("name", info.runnable_tables())
def test_a_set_said_to_run_does(name: str) -> None:
    code = "from vqkernels import info; print(info.report())"
    report = output_of(code, VQKERNELS_CPU_CAPABILITY=name)
    assert value(report, "instruction set in use") == name
    assert value(report, "VQKERNELS_CPU_CAPABILITY") == name


def test_one_line_for_every_op_and_the_backend_that_serves_it() -> None:
    report = info.report()
    ops = [name for name in vqkernels.ops.__all__ if name.islower()]
    assert "nearest_code" in ops
    for op in ops:
        backend, why = value(report, op).split(maxsplit=1)
        explanation = vqkernels.explain(op, torch.empty(0))
        assert backend == explanation.backend
        if backend == "reference":
            assert why == f"cpu: {explanation.reasons['cpu']}"
        else:
            assert why == "serves the call: automatic choice"


def test_a_backend_asked_for_by_name() -> None:
    with vqkernels.use_backend("reference"):
        assert value(info.report(), "nearest_code").startswith("reference  serves the call: asked")
    with vqkernels.use_backend("triton"):
        line = value(info.report(), "nearest_code")
    assert line.startswith("raises: backend 'triton' cannot serve nearest_code: ")


def test_verbose_says_what_each_backend_makes_of_each_op(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert info.main(["--verbose"]) == 0
    printed = capsys.readouterr().out
    for backend, reason in vqkernels.explain("quantize", torch.empty(0)).reasons.items():
        assert re.search(rf"^ +{backend} +{re.escape(reason)}$", printed, re.MULTILINE)
    lines = [line.split() for line in printed.splitlines()]
    named = sum(line[:1] == ["reference"] for line in lines)
    assert named == len([name for name in vqkernels.ops.__all__ if name.islower()])


@pytest.mark.parametrize("module", ["vqkernels.info", "vqkernels"])
def test_command_line(module: str) -> None:
    arguments = [] if module == "vqkernels.info" else ["info"]
    done = run_python("-m", module, *arguments)
    assert done.returncode == 0, done.stderr
    assert value(done.stdout, "vqkernels") == vqkernels.__version__


def test_loud_where_nothing_native_was_built(tmp_path: Path) -> None:
    package = without_lib(tmp_path)
    (package / "lib").mkdir()
    (package / "lib/build.json").write_text(json.dumps({"problem": "no C++ compiler was found"}))
    done = run_python("-m", "vqkernels.info", package=package)
    assert done.returncode == 0, done.stderr
    assert value(done.stdout, "last build") == "no C++ compiler was found"
    assert value(done.stdout, "instruction sets built") == "none"
    assert value(done.stdout, "nearest_code").startswith("reference  cpu: no native kernels were")
    banner = done.stdout.rstrip().splitlines()[-6:]
    assert banner[1].startswith("NO NATIVE KERNELS")
    assert any("pip install --no-build-isolation" in line for line in banner)


def test_loud_where_the_native_object_is_broken(tmp_path: Path) -> None:
    package = without_lib(tmp_path)
    (package / "lib").mkdir()
    (package / "lib" / native.OPS_OBJECT.name).write_text("not an object")
    done = run_python("-m", "vqkernels.info", package=package)
    assert done.returncode == 0, done.stderr
    assert value(done.stdout, "status").startswith("NOT IN USE: ")
    assert value(done.stdout, "last build").startswith("build.json cannot be read")
    assert native.OPS_OBJECT.name in done.stdout.rstrip().splitlines()[-2]


@needs_native
def test_a_set_that_is_not_there_is_said() -> None:
    done = run_python("-m", "vqkernels.info", VQKERNELS_CPU_CAPABILITY="sse2")
    assert done.returncode == 0, done.stderr
    assert "VQKERNELS_CPU_CAPABILITY must be one of" in value(done.stdout, "status")
    assert "NO NATIVE KERNELS" in done.stdout


def test_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is None:
        expected = "not in use: this torch was built without CUDA"
        assert value(info.report(), "CUDA status") == expected
        assert "last CUDA build" not in info.report()
    monkeypatch.setattr(native, "cuda_problem", "no CUDA kernels were built (planted)")
    monkeypatch.setattr(native, "last_build", lambda: {"cuda_problem": "nvcc was not found"})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    report = info.report()
    assert value(report, "CUDA status") == "not in use: no CUDA kernels were built (planted)"
    assert value(report, "last CUDA build") == "nvcc was not found"
    assert "built for" not in report
    monkeypatch.setattr(native, "cuda_problem", None)
    monkeypatch.setattr(native, "cuda_targets", "80+PTX 90a")
    report = info.report()
    assert value(report, "CUDA status") == "in use"
    assert value(report, "built for") == "80+PTX 90a"


@needs_native
def test_the_ops_object_knows_the_processor() -> None:
    """What it says agrees with what torch says of the same processor."""
    said, features = native.capabilities(), torch.cpu.get_capabilities()
    assert said["portable"]
    assert said[native.capability() or ""]
    if platform.machine() == "x86_64":
        assert list(said) == ["avx512_vnni_bf16", "avx512", "avx2", "portable"]
        assert said["avx2"] == (features["avx2"] and features["fma3"])
        assert said["avx512"] == (said["avx2"] and features["avx512_bw"] and features["avx512_vl"])


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in value(info.report(), "cuda:0")
        return
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert value(info.report(), "none") == "this torch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert value(info.report(), "none") == "torch finds none"


def test_every_op_with_a_kernel_is_in_the_report() -> None:
    assert set(backends.KERNELS) <= set(vqkernels.ops.__all__)
