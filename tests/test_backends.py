"""Which kernel serves a call, and what is said when one cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from _helpers.data import make
from _helpers.processes import PACKAGE, built_capabilities, output_of, run_python

import vqkernels
from vqkernels import backends, explain, native, nearest_code, quantize, use_backend

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_native = pytest.mark.skipif(native.problem is not None, reason=str(native.problem))

SEARCH = """
import torch, vqkernels
from vqkernels import native
torch.manual_seed(0)
x, codebook = torch.randn(50, 12), torch.randn(30, 12)
found = vqkernels.nearest_code(x, codebook)
assert torch.equal(found, torch.cdist(x.double(), codebook.double()).argmin(1))
print(vqkernels.explain("nearest_code", x, codebook).backend, native.capability())
"""


# ---- choosing ------------------------------------------------------------------------------


def test_what_was_built_is_loaded() -> None:
    """Without this, a broken build would only make other tests skip."""
    built = json.loads((native.DIRECTORY / "build.json").read_text())["problem"] is None
    assert built == native.OPS_OBJECT.exists()
    assert built == (native.problem is None), native.problem


@needs_native
def test_the_cpu_kernels_serve_the_cpu() -> None:
    x, codebook = make("gaussian", 5, 6, 4)
    found = explain("nearest_code", x, codebook)
    assert found.backend == "cpu"
    assert set(found.reasons) == {"reference", "cpu", "triton", "cuda"}
    assert "automatic choice" in found.reasons["cpu"]
    assert found.reasons["reference"] == "could serve the call"
    assert "cuda" in found.reasons["triton"] or "not installed" in found.reasons["triton"]
    text = str(found)
    assert text.startswith("nearest_code: cpu")
    assert all(name in text for name in found.reasons)


@needs_native
def test_explain_says_why_not() -> None:
    x, codebook = make("gaussian", 5, 6, 4)
    found = explain("nearest_code", x.double(), codebook.double())
    assert found.backend == "reference"
    assert "float64" in found.reasons["cpu"]
    with use_backend("cpu"):
        found = explain("nearest_code", x.double(), codebook=codebook.double())
        assert found.backend is None
        assert "no backend can serve" in str(found)
        assert "asked for by name" in explain("nearest_code", x, codebook).reasons["cpu"]
    assert explain("nearest_code", x.to("meta"), codebook.to("meta")).backend == "reference"
    with pytest.raises(ValueError, match="'no_such_op'"):
        explain("no_such_op", x)


@pytest.mark.parametrize("op", ["nearest_code", "quantize", "gather_codes", "pack_codebook"])
def test_a_backend_asked_for_by_name_must_serve_the_call(op: str) -> None:
    x, codebook = make("gaussian", 5, 6, 4)
    calls = {
        "nearest_code": lambda dtype: nearest_code(x.to(dtype), codebook.to(dtype)),
        "quantize": lambda dtype: quantize(x.to(dtype), codebook.to(dtype)),
        "gather_codes": lambda dtype: vqkernels.gather_codes(
            codebook.to(dtype), torch.zeros(3, dtype=torch.int64)
        ),
        "pack_codebook": lambda dtype: vqkernels.pack_codebook(codebook.to(dtype)),
    }
    if native.problem is None:
        with use_backend("cpu"), pytest.raises(ValueError, match=f"'cpu'.*{op}.*float64"):
            calls[op](torch.float64)
    for name in ("triton", "cuda"):
        with use_backend(name), pytest.raises(ValueError, match=f"'{name}' cannot serve {op}: "):
            calls[op](torch.float32)


def test_use_backend_refuses_unknown_names_and_restores_the_setting() -> None:
    x, codebook = make("gaussian", 5, 6, 4)
    before = explain("nearest_code", x, codebook).backend
    with pytest.raises(ValueError, match="auto, reference, cpu, triton, cuda, got 'gpu'"):
        use_backend("gpu").__enter__()
    with pytest.raises(TypeError, match="int32"), use_backend("reference"):
        nearest_code(x, codebook.int())
    assert explain("nearest_code", x, codebook).backend == before
    with use_backend("reference"):
        with use_backend("auto"):
            assert explain("nearest_code", x, codebook).backend == before
        assert explain("nearest_code", x, codebook).backend == "reference"
    assert explain("nearest_code", x, codebook).backend == before


@needs_native
def test_use_backend_holds_in_the_backward() -> None:
    """The backward runs the backend of its forward, also outside of the block."""
    x, codebook = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4)
    with use_backend("reference"):
        output = quantize(x, codebook)
    node = output.commitment_loss.grad_fn
    assert node is not None
    assert node.backend == "reference"
    output.commitment_loss.backward()
    assert x.grad is not None


def test_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backends._chosen.clear()
    x, codebook = make("gaussian", 5, 6, 4)
    with caplog.at_level("WARNING", logger="vqkernels"):
        for _ in range(3):
            nearest_code(x.double(), codebook.double())
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("nearest_code runs on reference")
    assert "float64" in messages[0] or native.problem is not None


# ---- the environment -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_backend_of_the_process(name: str) -> None:
    served = output_of(SEARCH, VQKERNELS_BACKEND=name).split()[0]
    assert served == ("reference" if name == "reference" or native.problem else "cpu")


def test_unknown_backend_of_the_process() -> None:
    done = run_python("-c", "import vqkernels", VQKERNELS_BACKEND="fastest")
    assert done.returncode != 0
    assert "VQKERNELS_BACKEND must be one of auto, reference, cpu" in done.stderr
    assert "got 'fastest'" in done.stderr


@needs_native
@pytest.mark.parametrize("name", ["portable", "nonsense"])
def test_instruction_set_of_the_process(name: str) -> None:
    done = run_python("-c", SEARCH, VQKERNELS_CPU_CAPABILITY=name)
    assert done.returncode == 0, done.stderr
    if name == "portable":
        assert done.stdout.split() == ["cpu", "portable"]
        assert "vqkernels" not in done.stderr
    else:
        assert done.stdout.split() == ["reference", "None"]
        assert "VQKERNELS_CPU_CAPABILITY must be one of" in done.stderr
        assert "got 'nonsense'" in done.stderr
        assert all(name in done.stderr for name in built_capabilities())


# ---- broken and foreign libraries ----------------------------------------------------------


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A copy of the package to damage."""
    package = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def assert_runs_on_the_reference(package: Path, *messages: str) -> None:
    """It warns with these words, and gives right answers on the reference."""
    done = run_python("-c", SEARCH, package=package)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["reference", "None"]
    assert "RuntimeWarning" in done.stderr
    assert "Falling back to the PyTorch references" in done.stderr
    for message in messages:
        assert message in done.stderr


@needs_native
def test_a_copy_runs_like_the_original(copied_package: Path) -> None:
    done = run_python("-c", SEARCH, package=copied_package)
    assert done.stdout.split() == ["cpu", native.capability()], done.stderr


def test_no_native_objects(copied_package: Path) -> None:
    shutil.rmtree(copied_package / "lib")
    done = run_python("-c", SEARCH, package=copied_package)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["reference", "None"]
    assert "no native kernels were built" in done.stderr


@pytest.mark.parametrize("content", [b"", b"this is no shared object" * 100])
def test_a_broken_ops_object(copied_package: Path, content: bytes) -> None:
    path = copied_package / "lib" / native.OPS_OBJECT.name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    assert_runs_on_the_reference(copied_package, f"{path.name} could not be loaded")


@needs_native
def test_a_foreign_ops_object(copied_package: Path) -> None:
    """A real shared object that knows nothing of vqkernels."""
    lib = copied_package / "lib"
    path = lib / native.OPS_OBJECT.name
    path.unlink()
    shutil.copy(lib / f"libvqkernels_cpu_portable{path.suffix}", path)
    assert_runs_on_the_reference(copied_package, path.name)


@needs_native
@pytest.mark.parametrize("damage", ["missing", "garbage", "foreign"])
def test_broken_kernel_tables(copied_package: Path, damage: str) -> None:
    lib = copied_package / "lib"
    for table in lib.glob("libvqkernels_cpu_*"):
        table.unlink()
        if damage == "garbage":
            table.write_bytes(b"garbage" * 1000)
        elif damage == "foreign":
            shutil.copy(lib / native.OPS_OBJECT.name, table)
    said = "belongs to another build" if damage == "foreign" else "libvqkernels_cpu_"
    assert_runs_on_the_reference(copied_package, said)


@needs_native
@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
@pytest.mark.parametrize("version", [0, 2**30])
def test_kernel_tables_of_another_version(copied_package: Path, version: int) -> None:
    """Nothing of a table with another version may be called or even read."""
    source = copied_package / "table.c"
    source.write_text(
        f"static const int version = {version};\n"
        "const void *vqkernels_kernel_table(void) {{ return &version; }}\n".format()
    )
    assert COMPILER is not None
    for table in (copied_package / "lib").glob("libvqkernels_cpu_*"):
        table.unlink()
        subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", table], check=True)
    assert_runs_on_the_reference(copied_package, "belongs to another build")


@needs_native
def test_the_next_best_table_takes_over(copied_package: Path) -> None:
    best = native.capability()
    if best == "portable":
        pytest.skip("this processor runs the portable kernels alone")
    for path in (copied_package / "lib").glob(f"libvqkernels_cpu_{best}.*"):
        path.unlink()
    done = run_python("-c", SEARCH, package=copied_package)
    assert done.returncode == 0, done.stderr
    backend, capability = done.stdout.split()
    assert backend == "cpu"
    assert capability != best


# ---- threads and processes -----------------------------------------------------------------


def test_concurrent_calls_give_the_same_bits(backend: str) -> None:
    """Calls of different shapes from several threads share per-thread working memory."""
    jobs = []
    for rows, codes, dim in ((300, 200, 8), (5, 3000, 64), (400, 90, 33), (64, 64, 3), (1, 9, 16)):
        x, codebook = make("neighbours", rows, codes, dim)
        jobs.append((x, codebook, nearest_code(x, codebook), quantize(x, codebook)))
    wrong: list[str] = []

    def work(first: int) -> None:
        for i in range(15):
            x, codebook, indices, output = jobs[(first + i) % len(jobs)]
            if not torch.equal(nearest_code(x, codebook), indices):
                wrong.append(f"nearest_code {tuple(x.shape)}")
            for mine, expected in zip(quantize(x, codebook), output, strict=True):
                if not torch.equal(mine, expected):
                    wrong.append(f"quantize {tuple(x.shape)}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_native
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_computes_the_same() -> None:
    """As in a data loader's worker: forked after the parent used its thread pool."""
    code = """
import os, torch, vqkernels
x, codebook = torch.randn(700, 32), torch.randn(500, 32)
expected = vqkernels.nearest_code(x, codebook)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = torch.equal(vqkernels.nearest_code(x, codebook), expected)
    os._exit(0 if same else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert output_of(code).split()[-1] == "0"
