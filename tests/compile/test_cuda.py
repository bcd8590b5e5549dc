"""The CUDA object, built against the torch that is here: what it holds, what its kernels need, and
whether it loads in a torch with CUDA.

`VQKERNELS_TORCH_CUDA_PYTHON` names a Python whose torch has CUDA; it needs no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from _helpers.builds import ROOT, build_script, compile_with
from machine_code import Code, demangled, kernels_of, targets_of, tool
from resource_table import MULTIPROCESSORS, TABLE, Needs, capability_of

from vqkernels.backends import CUDA_ATTENTION_DIMS

TARGETS = ("sm_80", "sm_90a", "sm_100", "sm_120")
OPS = ("nearest_code", "quantize", "quantize_backward_x", "quantize_backward_codebook")
MODULATIONS = tuple(
    f"{op}{of}"
    for op in ("ada_layer_norm", "gated_residual", "gated_residual_ada_layer_norm")
    for of in ("", "_backward")
)
# Columns of common models, and before them what takes one and two pieces a thread.
_WIDTHS = (128, 256, 384, 512, 768, 1024, 1152, 1536, 2560, 3072)
ATTENTION = ("attention", "attention_masked")  # one op, calls without and with a mask
# denoise_step is one op, with a kernel each for calls without guidance, with it, and with dynamic
# thresholds.
NOISE = (
    "normal_noise", "diffuse", "denoise_step", "denoise_step_guided", "denoise_step_dynamic",
)  # fmt: skip
ROWS, CODES = 1 << 17, 1 << 14
_WITH_PRODUCTS = ("search_tiles", "search_warpgroups", "products", "attend")
_SHORT = {"__half": "fp16", "__nv_bfloat16": "bf16", "float": "fp32"}
_DTYPES = (
    ("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp16", "fp32"), ("bf16", "fp32"),
)  # fmt: skip

CHECK_LOADED = """
import torch, vqkernels
from vqkernels import native
assert torch.version.cuda is not None, torch.__version__
assert native.cuda_problem is None, native.cuda_problem
for op in {ops}:
    name = f"vqkernels_cuda::{{op}}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
    getattr(torch.ops.vqkernels_cuda, op).default
print(native.cuda_targets)
"""


@dataclass(frozen=True)
class Call:
    """What a launcher is asked for."""

    op: str
    x: str
    book: str
    dim: int
    rows: int = ROWS


def calls() -> Iterator[Call]:
    """Every form of the search, and every kernel with each pair of dtypes, in rows that can be
    read in pieces and in rows that cannot."""
    for x, book in _DTYPES[:3]:
        for dim in (32, 64, 128, 192, 256, 512):
            yield Call("nearest_code", x, book, dim)
        yield Call("nearest_code", x, book, 256, rows=128)
    yield Call("nearest_code", "fp32", "fp32", 8)
    for x, book in _DTYPES[1:3]:
        yield Call("tensor_core_peak", x, book, 64)
    for op in OPS[1:]:
        for x, book in _DTYPES:
            for dim in (64, 7):
                yield Call(op, x, book, dim)
    for op in MODULATIONS:
        for x, branch in _DTYPES[:3]:
            for dim in _WIDTHS:
                yield Call(op, x, branch, dim)
        yield Call(op, "fp32", "fp32", 7)
    for op in NOISE:
        for x, outputs in _DTYPES:
            yield Call(op, x, outputs, 4096)
    for op in ATTENTION:
        for x, book in _DTYPES[1:3]:
            for dim in CUDA_ATTENTION_DIMS:
                yield Call(op, x, book, dim)


@dataclass(frozen=True)
class Built:
    object: Path
    objects: list[Path]  # of the kernels alone
    output: str


@pytest.fixture(scope="module")
def nvcc() -> str:
    script = build_script()
    try:
        return script["nvcc"]()
    except script["NativeBuildError"] as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def built(nvcc: str) -> Built:
    """As `VQKERNELS_CUDA=1` builds it, in a folder that later runs build on."""
    target = ROOT / "build/compile-tests"
    environment = {**os.environ, "VQKERNELS_NATIVE": "0", "VQKERNELS_CUDA": "1"}
    environment.pop("VQKERNELS_CUDA_ARCHS", None)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(target)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        start_new_session=True,  # without a terminal to announce that nothing is built for the CPU
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    work = ROOT / f"build/cuda-package-{sysconfig.get_platform()}"
    names = sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu"))
    name = build_script()["CUDA_OBJECT"]
    return Built(
        target / "vqkernels/lib" / name, [work / f"{name}.o" for name in names], done.stdout
    )


@pytest.fixture(scope="module")
def kernels(built: Built) -> dict[tuple[str, str], Code]:
    """Of each target and mangled name."""
    if tool("cuobjdump") is None or shutil.which("c++filt") is None:
        pytest.skip("needs cuobjdump, which Triton brings along, and c++filt")
    return kernels_of(built.object)


@pytest.fixture(scope="module")
def launches(
    built: Built, nvcc: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[tuple[int, int], Call]]:
    """Of each target and mangled name, the threads and bytes of dynamic shared memory that it is
    launched with, and the first call for which it is."""
    program = tmp_path_factory.mktemp("launches") / "cuda_launches"
    includes, _ = build_script()["toolkit_paths"](nvcc)
    source = Path(__file__).with_name("cuda_launches.cpp")
    headers = [f"-I{ROOT / 'csrc/cuda'}", *(f"-isystem{path}" for path in includes)]
    flags = ["-std=c++17", "-Wall", "-Wextra", *headers]
    compile_with(build_script()["compiler"](), *flags, source, *built.objects, "-o", program)
    found: dict[tuple[str, str], dict[tuple[int, int], Call]] = {}
    for target in TARGETS:
        capability = capability_of(target)
        of = MULTIPROCESSORS[capability]
        for call in calls():
            device = (capability, of.count, of.shared_block, of.shared)
            problem = (call.x, call.book, call.rows, CODES, call.dim)
            command = [program, call.op, *map(str, (*device, *problem))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                name, threads, shared = line.split()
                configurations = found.setdefault((target, name), {})
                configurations.setdefault((int(threads), int(shared)), call)
    return found


def test_it_has_code_for_every_target(built: Built) -> None:
    if tool("cuobjdump") is None:
        pytest.skip("needs cuobjdump, which Triton brings along")
    machine, text = targets_of(built.object)
    assert machine == set(TARGETS)
    assert text == {"sm_80"}
    assert "warning" not in built.output


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_it_needs_torch_alone_and_shows_nothing(built: Built) -> None:
    done = subprocess.run(
        ["readelf", "-dW", "--dyn-syms", built.object], capture_output=True, text=True, check=True
    )
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", done.stdout))
    assert {"libtorch_cuda", "libtorch_cpu"} <= needed
    assert not {name for name in needed if re.search("cudart|python|c10", name)}
    assert "RUNPATH" not in done.stdout
    defined = re.findall(r"(?:GLOBAL|WEAK) +DEFAULT +\d+ (\S+)", done.stdout)
    assert defined == ["vqkernels_cuda_targets"]
    assert not (built.object.parent / "libtorch_cuda.so").exists()


def test_kernels_stay_within_their_means(
    kernels: dict[tuple[str, str], Code],
    launches: dict[tuple[str, str], dict[tuple[int, int], Call]],
    nvcc: str,
) -> None:
    launched = {name for _, name in launches}
    assert launched == {name for _, name in kernels}, "kernels that no call launches"
    said = subprocess.run([*nvcc.split(), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", said)
    assert release, said
    compiler = f"nvcc {release[1]}"
    several = {name for (_, name), found in launches.items() if len(found) > 1}
    names = sorted(launched)
    plain = dict(zip(names, map(_plain, demangled(names)), strict=True))
    keys, wrong = set(), []
    for (target, name), configurations in sorted(launches.items()):
        kernel, variant = plain[name]
        for (threads, shared), call in configurations.items():
            words = [variant, f"dim{call.dim}" if name in several else ""]
            key = (compiler, target, kernel, " ".join(filter(None, words)) or "one")
            keys.add(key)
            code = kernels[target, name]
            tensor = "mma.sync" if code.tensor_instructions else "none"
            if any("GMMA" in instruction for instruction in code.instructions):
                tensor = "wgmma"
            needs = Needs(
                code.registers,
                code.static_shared + shared,
                code.spills,
                tensor,
                code.tensor_instructions,
                threads,
            )
            try:
                assert (tensor != "none") == (kernel in _WITH_PRODUCTS), "tensor-core instructions"
                assert not any(loop["LDL"] + loop["STL"] for loop in code.loops), "spills in a loop"
            except AssertionError as error:
                wrong.append(f"{' '.join(key)}: {error}")
            try:
                TABLE.check(key, needs)
            except AssertionError as error:
                wrong.append(f"{' '.join(key)}: {error}")
    assert not wrong, "\n".join(wrong)
    TABLE.assert_no_others(compiler, keys)
    TABLE.skip_if_unknown(compiler)


def test_modulated_rows_move_in_pieces_of_16_bytes(
    kernels: dict[tuple[str, str], Code],
) -> None:
    """As many loads and stores as a thread has pieces of a row, at least, and no spills."""
    seen = 0
    for (target, name), code in kernels.items():
        kernel, variant = _plain(demangled([name])[0])
        if not kernel.startswith("modulate_rows"):
            continue
        pieces = int(variant.split()[1])
        assert min(code.wide["LDG"], code.wide["STG"]) >= pieces, f"{target} {kernel} {variant}"
        assert code.spills == 0, f"{target} {kernel} {variant}"
        seen += 1
    assert seen >= len(TARGETS) * 2 * 3 * 3


@pytest.mark.parametrize(
    ("kernel", "loads", "stores"),
    [
        ("noise_pieces", 0, 1),
        ("diffuse_pieces", 2, 2),  # of the sample, and of noise of its dtype
        # Sample, outputs, histories, noise and variance; the next sample, prediction and extra.
        ("denoise_pieces", 8, 3),
        ("denoise_guided", 9, 3),
        ("denoise_samples", 9, 3),
    ],
)
def test_noise_moves_in_pieces_of_16_bytes(
    kernels: dict[tuple[str, str], Code], kernel: str, loads: int, stores: int
) -> None:
    seen = 0
    for (target, name), code in kernels.items():
        found, variant = _plain(demangled([name])[0])
        if found == kernel:
            assert code.wide["LDG"] >= loads, f"{target} {kernel} {variant}"
            assert code.wide["STG"] >= stores, f"{target} {kernel} {variant}"
            assert code.spills == 0, f"{target} {kernel} {variant}"
            seen += 1
    assert seen == 3 * len(TARGETS)


def _plain(name: str) -> tuple[str, str]:
    """A kernel's name and its template's arguments: "search_tiles", "fp16 false 2"."""
    name = name.replace("(anonymous namespace)::", "").replace("vqkernels::cuda::", "")
    found = re.match(r"(?:void )?(\w+)(?:<(.*?)>)?\(", name)
    assert found, name
    arguments = (found[2] or "").split(", ")
    return found[1], " ".join(_SHORT.get(argument, argument) for argument in arguments)


def test_it_loads_in_a_torch_with_cuda(built: Built, tmp_path: Path) -> None:
    python = os.environ.get("VQKERNELS_TORCH_CUDA_PYTHON")
    if python is None and torch.version.cuda is not None:
        python = sys.executable
    if python is None:
        pytest.skip("VQKERNELS_TORCH_CUDA_PYTHON names no Python whose torch has CUDA")
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "vqkernels", tmp_path / "vqkernels", ignore=ignored)
    (tmp_path / "vqkernels/lib").mkdir()
    shutil.copy(built.object, tmp_path / "vqkernels/lib")
    done = subprocess.run(
        [python, "-c", CHECK_LOADED.format(ops=(*OPS, *MODULATIONS, "attention", *NOISE[:3]))],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == build_script()["CUDA_TARGETS"].split()
