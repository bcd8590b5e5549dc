"""Which kernel serves a call, and what is said when one cannot."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import re
import shutil
import subprocess
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from _helpers.data import make
from _helpers.processes import PACKAGE, built_capabilities, output_of, run_python
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vqkernels
from vqkernels import backends, explain, native, nearest_code, quantize, selection, use_backend

attention_op = importlib.import_module("vqkernels.ops.attention")

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
    backends._logged.clear()
    x, codebook = make("gaussian", 5, 6, 4)
    with caplog.at_level("WARNING", logger="vqkernels"):
        for _ in range(3):
            nearest_code(x.double(), codebook.double())
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("nearest_code runs on reference")
    assert "float64" in messages[0] or native.problem is not None


# ---- choosing on a GPU, without one --------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Tensors that say they are on a GPU, and how to say which one, and what can serve it."""
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(native, "cuda_problem", None)

    def is_a(capability: int, targets: str = "80+PTX 90a 100 120") -> None:
        monkeypatch.setattr(native, "cuda_targets", targets)
        monkeypatch.setattr(backends, "_capabilities", {0: capability, None: capability})

    with FakeTensorMode():
        yield is_a


def on_gpu(rows: int, codes: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.empty(rows, dim, dtype=dtype, device="cuda")
    return x, torch.empty(codes, dim, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("capability", "rows", "dim", "dtype", "expected"),
    [
        (90, 65536, 64, torch.float16, "triton"),
        (100, 65536, 256, torch.bfloat16, "triton"),
        (90, 65536, 32, torch.float16, "cuda"),
        (90, 65536, 256, torch.float32, "cuda"),
        (80, 65536, 256, torch.float16, "cuda"),
        (120, 65536, 256, torch.float16, "cuda"),
        (90, 65536, 8, torch.float16, "triton"),
        (90, 65536, 8, torch.float32, "cuda"),
        (90, 1024, 256, torch.float16, "cuda"),
        (90, 1025, 256, torch.float16, "triton"),
    ],
)
def test_the_table_chooses_on_a_gpu(
    gpu: Callable[..., None],
    capability: int,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    expected: str,
) -> None:
    gpu(capability)
    tensors = on_gpu(rows, 512, dim, dtype)
    for op in selection.SEARCHES:
        assert backends.select(op, *tensors) == expected
        found = explain(op, *tensors)
        assert found.backend == expected
        row = selection.preferred(selection.GpuCall(capability, dim, rows <= 1024), (dtype, dtype))
        assert row is not None
        assert row.reason in found.reasons[expected]
        assert ("an estimate" in found.reasons[expected]) != row.measured
        for name in ("triton", "cuda"):
            with use_backend(name):
                assert backends.select(op, *tensors) == name


def test_a_large_book_is_searched_by_cuda(gpu: Callable[..., None]) -> None:
    gpu(90)
    for codes, expected in ((selection.LARGE_BOOK, "cuda"), (selection.LARGE_BOOK - 1, "triton")):
        x, codebook = on_gpu(65536, codes, 256, torch.bfloat16)
        assert backends.select("nearest_code", x, codebook) == expected


def test_modulation_is_chosen_where_it_was_measured(gpu: Callable[..., None]) -> None:
    gpu(90)
    half, single = torch.bfloat16, torch.float32
    for op, dim, dtype, expected in (
        ("ada_layer_norm", 384, half, "cuda"),
        ("ada_layer_norm", 3072, half, "cuda"),
        ("ada_layer_norm", 1152, single, "cuda"),
        ("gated_residual_ada_layer_norm", 384, half, "cuda"),
        ("gated_residual_ada_layer_norm", 3072, half, "cuda"),
        ("gated_residual_ada_layer_norm", 1152, single, "triton"),
        ("gated_residual", 1152, half, "triton"),  # level there
        # Not measured.
        ("ada_layer_norm", 256, half, "triton"),
        ("ada_layer_norm", 8192, half, "triton"),
        ("ada_layer_norm", 384, single, "triton"),
    ):
        x, vectors = on_gpu(4096, 4, dim, dtype)
        assert backends.select(op, x, vectors, vectors) == expected
    gpu(100)
    x, vectors = on_gpu(4096, 4, 1152, half)
    assert backends.select("ada_layer_norm", x, vectors, vectors) == "triton"


def test_a_half_with_a_float32_book_is_no_half(gpu: Callable[..., None]) -> None:
    gpu(90)
    x, codebook = on_gpu(65536, 512, 64, torch.float16)
    assert backends.select("nearest_code", x, codebook) == "triton"
    assert backends.select("nearest_code", x, codebook.float()) == "cuda"


def test_without_the_cuda_object_triton_serves_the_gpu(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu(90)
    monkeypatch.setattr(native, "cuda_problem", "no CUDA kernels were built (planted)")
    tensors = on_gpu(65536, 512, 64, torch.float32)
    with caplog.at_level("WARNING", logger="vqkernels"):
        for dim in (32, 48, 64):  # chosen for each, said once
            assert backends.select("nearest_code", *on_gpu(9, 9, dim, torch.float32)) == "triton"
    (said,) = caplog.messages
    assert said.startswith("nearest_code runs on triton; cuda: no CUDA kernels were built")
    found = explain("nearest_code", *tensors)
    assert found.backend == backends.select("nearest_code", *tensors) == "triton"
    assert found.passed_over == ("cuda",)
    assert found.reasons["cuda"].startswith("no CUDA kernels were built (planted)")
    with use_backend("cuda"), pytest.raises(ValueError, match="planted"):
        backends.select("nearest_code", *tensors)


def test_an_old_gpu_runs_on_the_reference(
    gpu: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    gpu(75)
    tensors = on_gpu(65536, 512, 64, torch.float16)
    for op in ("nearest_code", "quantize", "code_statistics"):
        with caplog.at_level("WARNING", logger="vqkernels"):
            assert backends.select(op, *tensors) == "reference"
        assert "triton: its kernels need compute capability 8.0 or newer, got 7.5" in caplog.text
        with use_backend("triton"), pytest.raises(ValueError, match=r"8\.0 or newer, got 7\.5"):
            backends.select(op, *tensors)


def test_an_object_for_other_gpus_does_not_serve_this_one(gpu: Callable[..., None]) -> None:
    gpu(80, targets="90a")
    tensors = on_gpu(65536, 512, 64, torch.float16)
    assert backends.select("nearest_code", *tensors) == "triton"
    with use_backend("cuda"), pytest.raises(ValueError, match=r"built for 90a.*8\.0"):
        backends.select("nearest_code", *tensors)


def test_the_choice_is_a_constant_of_a_compiled_function(gpu: Callable[..., None]) -> None:
    gpu(90)
    chosen: list[str] = []

    def spy(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        chosen.extend(str(n.args[-1]) for n in graph.graph.nodes if "nearest_code" in str(n.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(nearest_code, fullgraph=True, backend=spy)
    with contextlib.suppress(NotImplementedError, RuntimeError):  # a kernel on no real tensor
        compiled(*on_gpu(65536, 512, 64, torch.float16))
    torch._dynamo.reset()
    assert chosen == ["triton"]


def heads_on_gpu(dim: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    of = [torch.empty(1, 2, 8, d, dtype=dtype, device="cuda") for d in (dim, dim, columns)]
    return of[0], of[1], of[2]


def test_triton_is_the_first_choice_for_attention(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(90)
    tensors = heads_on_gpu(72, 72, torch.bfloat16)
    assert backends.select("attention", *tensors) == "triton"
    found = explain("attention", *tensors)
    assert found.backend == "triton"
    assert found.reasons["cuda"] == "could serve the call"
    with use_backend("cuda"):
        assert backends.select("attention", *tensors) == "cuda"
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", False)
    backends._chosen.clear()
    assert backends.select("attention", *tensors) == "cuda"
    assert backends.select("attention", *heads_on_gpu(40, 40, torch.bfloat16)) == "reference"


@pytest.mark.parametrize(
    "op", ["ada_layer_norm", "gated_residual", "gated_residual_ada_layer_norm"]
)
def test_triton_is_the_first_choice_for_modulation(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    gpu(80)
    x = torch.empty(2, 8, 33, dtype=torch.float16, device="cuda")
    vectors = [torch.empty(2, 33, dtype=of, device="cuda") for of in (torch.float32, x.dtype)]
    for tensors in ((x, *vectors), (x, x.bfloat16(), *vectors), (x.float(), *vectors)):
        assert backends.select(op, *tensors) == "triton"
        assert explain(op, *tensors).reasons["cuda"] == "could serve the call"
        with use_backend("cuda"):
            assert backends.select(op, *tensors) == "cuda"
    double = (x.double(), *vectors)
    assert backends.select(op, *double) == "reference"
    with use_backend("cuda"), pytest.raises(ValueError, match=r"got torch\.float64"):
        backends.select(op, *double)
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", False)
    backends._chosen.clear()
    assert backends.select(op, x, *vectors) == "cuda"


@pytest.mark.parametrize(
    ("dim", "columns", "dtype", "reason"),
    [
        (88, 88, torch.float16, r"64, 72, 80, 96, 128 columns, got 88 of q and 88 of v"),
        (64, 128, torch.bfloat16, r"columns, got 64 of q and 128 of v"),
        (64, 64, torch.float32, r"take float16 and bfloat16, got torch.float32"),
    ],
)
def test_what_cuda_attention_refuses(
    gpu: Callable[..., None], dim: int, columns: int, dtype: torch.dtype, reason: str
) -> None:
    gpu(90)
    tensors = heads_on_gpu(dim, columns, dtype)
    assert backends.select("attention", *tensors) == "triton"
    assert re.search(reason, explain("attention", *tensors).reasons["cuda"])
    with use_backend("cuda"), pytest.raises(ValueError, match=reason):
        backends.select("attention", *tensors)


@pytest.mark.parametrize("installed", [True, False])
def test_gradients_of_cuda_attention_are_of_another_backend(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    gpu(90)
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", installed)
    called: list[str] = []

    def spy(*arguments: object) -> tuple[Tensor, ...]:
        called.append(str(arguments[-1]))
        return tensors

    monkeypatch.setattr(attention_op, "_attention_backward", spy)
    tensors = heads_on_gpu(64, 64, torch.float16)
    q = tensors[0]
    context = types.SimpleNamespace(
        saved_tensors=(*tensors, q, q, None, None),
        is_causal=False,
        scale=0.125,
        dropout_p=0.0,
        backend="cuda",
    )
    attention_op._backward(context, q, None)
    assert called == ["triton" if installed else "reference"]


@pytest.mark.parametrize(
    ("targets", "served", "refused"),
    [
        ("80+PTX 90a 100 120", (80, 86, 89, 90, 100, 103, 110, 120, 121), (75,)),
        ("90a", (90,), (80, 89, 91, 100)),
        ("80 100", (80, 86, 89, 100, 103), (75, 90, 120)),
        ("86", (86, 89), (80, 90)),
        ("86+PTX", (86, 89, 90, 120), (80,)),
        ("", (), (80, 90)),
    ],
)
def test_which_gpus_an_object_serves(
    monkeypatch: pytest.MonkeyPatch, targets: str, served: tuple[int, ...], refused: tuple[int, ...]
) -> None:
    monkeypatch.setattr(native, "cuda_targets", targets)
    assert [c for c in (*served, *refused) if native.cuda_serves(c)] == list(served)


def test_every_call_has_a_row_and_every_row_a_call() -> None:
    found = {
        selection.preferred(selection.GpuCall(capability, dim, few_rows, large_book), dtypes, op)
        for op in selection.OPS
        for capability in (80, 86, 89, 90, 100, 103, 110, 120, 121)
        for dim in (0, 1, 16, 17, 63, 64, 256, 1152, 4096)
        for few_rows in (False, True)
        for large_book in (False, True)
        for dtypes in ((torch.float16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2)
    }
    # Modulation has rows where it was measured, and each search has one.
    assert found == {*selection.TABLE, None}
    calls = itertools.product((80, 86, 90, 100, 120), (0, 16, 17, 256, 4096), (False, True))
    assert all(selection.preferred(selection.GpuCall(*call), (torch.float32,)) for call in calls)
    for row in selection.TABLE:
        assert row.reason
        assert sorted(row.order) == ["cuda", "reference", "triton"]


def test_a_cuda_object_needs_a_torch_with_cuda(tmp_path: Path) -> None:
    """Where torch has no CUDA, an object that lies there must not be opened."""
    package = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "lib" / native.CUDA_OBJECT.name
    path.unlink(missing_ok=True)
    path.write_bytes(b"not an object")
    code = (
        "import torch; torch.version.cuda = {}; import vqkernels.native as n; print(n.cuda_problem)"
    )
    done = run_python("-W", "error", "-c", code.format(None), package=package)
    assert done.stdout.strip() == "this torch was built without CUDA", done.stderr
    done = run_python("-c", code.format("'13.0'"), package=package)
    assert done.stdout.startswith(f"{path.name} could not be loaded"), done.stderr
    assert "GPU tensors run on Triton" in done.stderr
    path.unlink()
    (package / "lib/build.json").write_text('{"cuda_problem": "nvcc is on holiday"}')
    done = run_python("-c", code.format("'13.0'"), package=package)
    assert done.stdout.strip() == "no CUDA kernels were built (nvcc is on holiday)", done.stderr


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
