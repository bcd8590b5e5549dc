"""The wheel, the sdist and the editable build, made in a copy of the source, and builds that lack
something. Kernels are compiled without optimization here: what counts is what is packed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from _helpers.builds import ROOT, build_script
from _helpers.processes import run_python

from vqkernels import native

NM = shutil.which("nm")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
WRITES_ITS_ARGUMENTS = """#!/bin/sh
for argument; do
  [ "$previous" = -o ] && out=$argument
  previous=$argument
done
echo "$@" > "$out"
"""
CHECK_NATIVE = """
import torch, vqkernels
from vqkernels import native
assert native.problem is None, native.problem
x, codebook = torch.randn(50, 24), torch.randn(70, 24)
with vqkernels.use_backend("cpu"):
    fast = vqkernels.nearest_code(x, codebook)
with vqkernels.use_backend("reference"):
    assert torch.equal(fast, vqkernels.nearest_code(x, codebook))
print(vqkernels.__file__, native.capability())
"""


def copy_source(to: Path) -> Path:
    for name in FILES:
        shutil.copy(ROOT / name, to / name)
    shutil.copytree(ROOT / "csrc", to / "csrc")
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "vqkernels", to / "vqkernels", ignore=ignored)
    return to


def build(source: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in `source` with the build backend at hand as `backend`."""
    command = [sys.executable, "-c", f"import setuptools.build_meta as backend; {code}"]
    wanted = {"MAX_JOBS": "1", "VQKERNELS_NATIVE": "1", "VQKERNELS_CUDA": "0"}
    env = {**os.environ, **wanted, **environment}
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The compiler with optimization switched off, for CXX."""
    script = build_script()
    try:
        real = script["compiler"]()
    except script["NativeBuildError"] as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("compiler") / "c++"
    path.write_text(f'#!/bin/sh\nexec {real} "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = build(source, f"backend.build_wheel({str(out)!r})", CXX=compiler)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installation would."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site / "vqkernels"


def expected_objects() -> set[str]:
    script = build_script()
    machine = {"arm64": "aarch64"}.get(os.uname().machine, os.uname().machine)
    tables = script["CAPABILITIES"].get(machine, {"portable": ""})
    names = [f"libvqkernels_cpu_{name}" for name in tables]
    return {f"{name}{script['SUFFIX']}" for name in [*names, "libvqkernels_ops"]}


def test_wheel_serves_every_python(wheel: Path) -> None:
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert re.fullmatch(rf"vqkernels-[\d.]+-py3-none-{platform}\.whl", wheel.name)


def test_wheel_holds_the_package_and_its_objects_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    lib = "vqkernels/lib/"
    objects = {name.removeprefix(lib) for name in names if name.startswith(lib)}
    assert objects == expected_objects() | {"build.json"}
    others = {name for name in names if not name.startswith(lib)}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "vqkernels").rglob("*.py")}
    assert others == sources | {"vqkernels/py.typed"}


@pytest.mark.skipif(NM is None, reason="nm is not installed")
def test_objects_need_no_python_and_tables_no_torch(installed: Path) -> None:
    for path in sorted((installed / "lib").glob("lib*")):
        done = subprocess.run(
            [str(NM), "-D", "--undefined-only", path], capture_output=True, text=True, check=True
        )
        needed = [line.split()[-1] for line in done.stdout.splitlines()]
        assert needed
        assert not [name for name in needed if name.startswith(("Py", "_Py"))]
        if path.name.startswith("libvqkernels_cpu_"):
            assert not [name for name in needed if re.search("torch|c10|aoti|at6", name)]


@pytest.mark.skipif(NM is None, reason="nm is not installed")
@pytest.mark.skipif(native.problem is not None, reason=str(native.problem))
def test_optimized_tables_export_one_symbol() -> None:
    for path in sorted(native.DIRECTORY.glob("libvqkernels_cpu_*")):
        done = subprocess.run(
            [str(NM), "-D", "--defined-only", path], capture_output=True, text=True, check=True
        )
        assert [line.split()[-1] for line in done.stdout.splitlines()] == ["vqkernels_kernel_table"]


def test_installed_wheel_runs_its_native_kernels(installed: Path) -> None:
    done = run_python("-c", CHECK_NATIVE, package=installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))


def test_sdist_holds_the_sources(source: Path, tmp_path: Path) -> None:
    done = build(source, f"backend.build_sdist({str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | set(FILES) <= names
    assert not [name for name in names if re.search(r"\.(so|o|dylib)$", name)]


def test_editable_build_puts_objects_and_development_module_in_place(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    source = copy_source(tmp_path)
    compiler = tmp_path / "c++"
    compiler.write_text(WRITES_ITS_ARGUMENTS)
    compiler.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    done = build(source, f"backend.build_editable({str(out)!r})", CXX=str(compiler))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    module = f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    lib = source / "vqkernels/lib"
    assert {path.name for path in lib.iterdir()} == expected_objects() | {"build.json", module}
    assert json.loads((lib / "build.json").read_text())["problem"] is None
    assert "-ltorch_cpu" in (lib / f"libvqkernels_ops{native.OPS_OBJECT.suffix}").read_text()
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        assert not [name for name in archive.namelist() if "/lib/" in name]


class Lacking:
    """A build in an environment of its own, which has only what it is given."""

    def __init__(self, folder: Path) -> None:
        self.source = copy_source(folder)
        self.programs = folder / "bin"
        self.modules = folder / "site"
        self.programs.mkdir()
        self.modules.mkdir()
        # A link has no `site-packages` and no other program beside it.
        (self.programs / "python").symlink_to(os.path.realpath(sys.executable))
        self.give_module("setuptools")
        self.give_module("_distutils_hack")

    def give_module(self, name: str) -> None:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (self.modules / name).symlink_to(Path(spec.origin).parent, target_is_directory=True)

    def give_program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def build(
        self, wanted: str = "auto", cuda: str = "0", **more: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.programs / "python"), "-S", "setup.py", "build_ext", "--inplace"],
            cwd=self.source,
            env={
                "PATH": str(self.programs),
                "PYTHONPATH": str(self.modules),
                "VQKERNELS_NATIVE": wanted,
                "VQKERNELS_CUDA": cuda,
                **more,
            },
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture
def lacking(tmp_path: Path) -> Lacking:
    return Lacking(tmp_path)


def lack_torch(lacking: Lacking) -> str:
    lacking.give_program("g++", "exit 0")
    lacking.give_program("ninja", "exit 0")
    return "torch is not installed in the build's environment"


def lack_compiler(lacking: Lacking) -> str:
    lacking.give_module("torch")
    lacking.give_program("ninja", "exit 0")
    return "no C++ compiler was found"


def lack_ninja(lacking: Lacking) -> str:
    lacking.give_module("torch")
    lacking.give_program("g++", "exit 0")
    return "ninja was not found"


def lack_luck(lacking: Lacking) -> str:
    lacking.give_module("torch")
    lacking.give_program("g++", "exit 0")
    lacking.give_program("ninja", "echo 'kernel_table.cpp:7: error: planted'; exit 1")
    return "kernel_table.cpp:7: error: planted"


@pytest.mark.parametrize("lack", [lack_torch, lack_compiler, lack_ninja, lack_luck])
def test_a_build_without_something_says_so_and_leaves_a_working_package(
    lacking: Lacking, lack: object
) -> None:
    assert callable(lack)
    problem = lack(lacking)

    done = lacking.build(wanted="1")
    assert done.returncode != 0
    assert "vqkernels: native build failed" in done.stderr
    assert problem in done.stderr

    done = lacking.build()
    assert done.returncode == 0, done.stderr
    assert "NO NATIVE KERNELS WERE BUILT" in done.stderr
    assert problem in done.stderr
    package = lacking.source / "vqkernels"
    assert problem in json.loads((package / "lib/build.json").read_text())["problem"]

    code = (
        "import torch, vqkernels as v; from vqkernels import info; "
        "print(v.nearest_code(torch.eye(3), torch.eye(3))); print(info.report())"
    )
    done = run_python("-c", code, package=package)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor([0, 1, 2])\n")
    assert "NO NATIVE KERNELS" in done.stdout
    assert problem in done.stdout


def test_a_compiler_that_is_not_there_is_named(lacking: Lacking) -> None:
    lacking.give_module("torch")
    lacking.give_program("g++", "exit 0")
    command = "import os, runpy; os.environ['CXX'] = 'none-such --fast'; runpy.run_path('setup.py')"
    done = subprocess.run(
        [str(lacking.programs / "python"), "-S", "-c", command, "build_ext", "--inplace"],
        cwd=lacking.source,
        env={"PATH": str(lacking.programs), "PYTHONPATH": str(lacking.modules)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "the compiler that CXX names was not found: 'none-such --fast'" in done.stderr


def test_native_kernels_can_be_declined(lacking: Lacking) -> None:
    done = lacking.build(wanted="0")
    assert done.returncode == 0, done.stderr
    assert "VQKERNELS_NATIVE=0 asked for no native kernels" in done.stderr
    assert not list((lacking.source / "vqkernels/lib").glob("lib*"))


# ---- the CUDA object -----------------------------------------------------------------------

SAYS_WHERE_IT_LOOKS = """
echo '#$ INCLUDES="-I/toolkit/include"' >&2
echo '#$ LIBRARIES=  "-L/toolkit/stubs" "-L/toolkit/lib"' >&2
"""


@pytest.fixture
def for_cuda(lacking: Lacking) -> Lacking:
    """All that a build needs, but for nvcc and a torch."""
    lacking.give_program("g++", "exit 0")
    lacking.give_program("ninja", "exit 0")
    return lacking


def give_torch(lacking: Lacking, cuda: str | None) -> None:
    """As much of a torch as a build looks at."""
    folder = lacking.modules / "torch"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("raise ImportError('not to be imported by a build')")
    (folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\n"
        "hip: Optional[str] = None\n"
    )


def give_nvcc(lacking: Lacking) -> str:
    """A home for CUDA_HOME."""
    lacking.give_program("nvcc", SAYS_WHERE_IT_LOOKS)
    home = lacking.programs.parent
    return str(home)


def said_of_cuda(lacking: Lacking) -> str | None:
    return json.loads((lacking.source / "vqkernels/lib/build.json").read_text())["cuda_problem"]


def cuda_plan_of(lacking: Lacking) -> str:
    (path,) = (lacking.source / "build").glob("cuda-*/build.ninja")
    return path.read_text()


def test_kernels_for_every_target_are_planned_where_torch_has_cuda(for_cuda: Lacking) -> None:
    give_torch(for_cuda, "13.0")
    done = for_cuda.build(cuda="auto", CUDA_HOME=give_nvcc(for_cuda))
    assert done.returncode == 0, done.stderr
    assert said_of_cuda(for_cuda) is None
    assert "WERE BUILT" not in done.stderr
    plan = cuda_plan_of(for_cuda)
    for target in ("80", "90a", "100", "120"):
        assert f"-gencode=arch=compute_{target},code=sm_{target}" in plan
    assert plan.count("code=compute_80") == len(list((ROOT / "csrc/cuda").glob("*.cu"))) > 0
    assert "-isystem /toolkit/include" in plan
    assert "-L/toolkit/lib" in plan
    assert "-soname,$out" in plan


def test_fewer_targets_can_be_asked_for(for_cuda: Lacking) -> None:
    give_torch(for_cuda, None)
    home = give_nvcc(for_cuda)
    done = for_cuda.build(cuda="1", CUDA_HOME=home, VQKERNELS_CUDA_ARCHS="90a, 120+PTX")
    assert done.returncode == 0, done.stderr
    plan = cuda_plan_of(for_cuda)
    assert set(re.findall(r",code=(\w+)", plan)) == {"sm_90a", "sm_120", "compute_120"}
    assert "VQKERNELS_CUDA_TARGETS='\"90a 120+PTX\"'" in plan
    done = for_cuda.build(cuda="1", CUDA_HOME=home, VQKERNELS_CUDA_ARCHS="hopper")
    assert done.returncode != 0
    assert "VQKERNELS_CUDA_ARCHS must be targets" in done.stderr
    assert "got 'hopper'" in done.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"VQKERNELS_CUDA": "0"}, "VQKERNELS_CUDA=0 asked for no CUDA kernels"),
        ({"VQKERNELS_NATIVE": "0"}, "VQKERNELS_NATIVE=0 asked for no native kernels"),
        ({}, "this torch was built without CUDA"),
    ],
)
def test_no_cuda_kernels_where_none_are_wanted(
    for_cuda: Lacking, environment: dict[str, str], said: str
) -> None:
    give_torch(for_cuda, None)
    done = for_cuda.build(cuda="auto", CUDA_HOME=give_nvcc(for_cuda), **environment)
    assert done.returncode == 0, done.stderr
    assert (said_of_cuda(for_cuda) or "").startswith(said)
    assert "NO CUDA KERNELS" not in done.stderr
    assert not list((for_cuda.source / "build").glob("cuda-*"))


def test_a_missing_nvcc_is_said_and_an_object_from_elsewhere_stays(for_cuda: Lacking) -> None:
    give_torch(for_cuda, "13.0")
    problem = "the compiler that CUDACXX names was not found: 'none-such -v'"
    done = for_cuda.build(cuda="1", CUDACXX="none-such -v")
    assert done.returncode != 0
    assert f"vqkernels: CUDA build failed: {problem}" in done.stderr

    done = for_cuda.build(cuda="auto", CUDACXX="none-such -v")
    assert done.returncode == 0, done.stderr
    assert "NO CUDA KERNELS WERE BUILT" in done.stderr
    assert problem in done.stderr
    assert said_of_cuda(for_cuda) == problem

    brought_along = for_cuda.source / "vqkernels/lib" / native.CUDA_OBJECT.name
    brought_along.write_text("from another machine")
    for cuda in ("auto", "0"):
        done = for_cuda.build(cuda=cuda, CUDACXX="none-such -v")
        assert done.returncode == 0, done.stderr
        assert "NO CUDA KERNELS" not in done.stderr
        assert brought_along.read_text() == "from another machine"


def test_an_nvcc_that_fails_leaves_the_cpu_kernels(for_cuda: Lacking) -> None:
    give_torch(for_cuda, "13.0")
    for_cuda.give_program(
        "ninja", 'case "$2" in */cuda-*) echo "quantize.cu(7): planted"; exit 1; esac'
    )
    done = for_cuda.build(cuda="auto", CUDA_HOME=give_nvcc(for_cuda))
    assert done.returncode == 0, done.stderr
    assert "NO NATIVE KERNELS" not in done.stderr
    assert "NO CUDA KERNELS WERE BUILT" in done.stderr
    assert "quantize.cu(7): planted" in (said_of_cuda(for_cuda) or "")


@pytest.mark.parametrize("name", ["VQKERNELS_CUDA", "VQKERNELS_NATIVE"])
def test_settings_that_mean_nothing_are_refused(for_cuda: Lacking, name: str) -> None:
    give_torch(for_cuda, None)
    done = for_cuda.build(**{"wanted": "auto", "cuda": "auto", name: "yes"})
    assert done.returncode != 0
    assert f"{name} must be auto, 0 or 1, got 'yes'" in done.stderr
