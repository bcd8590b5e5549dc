"""Builds the native CPU kernels with ninja: one shared object an instruction set, free of torch,
and one ops object over LibTorch's stable ABI, free of Python.

Environment: VQKERNELS_NATIVE=1 makes a failed native build an error (default: build what can be
built, say loudly what could not); VQKERNELS_NATIVE=0 skips it. CXX names the compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
TORCH_TARGET = "0x020b000000000000"  # the oldest torch the ops object must load in: 2.11

AVX2 = "-mavx2 -mfma"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
CAPABILITIES = {
    "x86_64": {
        "portable": "",
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_vnni_bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
    },
    "aarch64": {"portable": "", "neon": "-DVQKERNELS_NEON"},
}
# Sums must round the same way wherever they are computed, so no contraction: kernels fuse
# explicitly.
COMMON = (
    "-O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno "
    "-Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
)


class NativeBuildError(Exception):
    pass


def torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NativeBuildError(
            "torch is not installed in the build's environment; install torch first and build "
            "with `pip install --no-build-isolation .`"
        )
    return Path(spec.origin).parent


def compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ("g++", "clang++", "c++"):
        if shutil.which(name.split()[0]):
            return name
    if asked:
        raise NativeBuildError(f"the compiler that CXX names was not found: {asked!r}")
    raise NativeBuildError("no C++ compiler was found (looked for g++, clang++, c++, and $CXX)")


def ninja() -> str:
    beside_python = Path(sys.executable).parent / "ninja"
    found = shutil.which("ninja") or (str(beside_python) if beside_python.exists() else None)
    if found is None:
        raise NativeBuildError("ninja was not found; `pip install ninja`")
    return found


def table_version() -> str:
    """A hash of what the objects agree on, so that those of different builds refuse each other."""
    headers = sorted([*(ROOT / "csrc/common").glob("*.h"), *(ROOT / "csrc/cpu").glob("*.h")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in headers)).digest()
    return str(int.from_bytes(digest[:4], "little") >> 1)


def build_plan(out: Path, with_development_module: bool) -> str:
    """The ninja file: rules, then the kernel tables, the ops object, the development module."""
    torch = torch_directory()
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    capabilities = CAPABILITIES.get(machine, {"portable": ""})
    common = f"{COMMON} -DVQKERNELS_TABLE_VERSION={table_version()}"
    lines = [
        f"cxx = {compiler()}",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx -shared $in -o $out $libraries",
        "  description = link $out",
    ]

    def compile_to(target: str, source: Path, flags: str) -> str:
        lines.append(f"build {target}: compile {source}")
        lines.append(f"  flags = {flags}")
        return target

    def link_to(target: Path, objects: list[str], libraries: str) -> None:
        lines.append(f"build {target}: link {' '.join(objects)}")
        lines.append(f"  libraries = {libraries}")

    # Nothing that was compiled for one instruction set, templates of the standard library
    # included, may be found by code that was compiled for another.
    exports = (
        "-Wl,-exported_symbol,_vqkernels_kernel_table"
        if sys.platform == "darwin"
        else f"-Wl,--version-script={ROOT / 'csrc/cpu/exports.map'}"
    )
    for name, flags in capabilities.items():
        define = f'-DVQKERNELS_CAPABILITY=\\"{name}\\"'
        table = compile_to(
            f"table_{name}.o",
            ROOT / "csrc/cpu/kernel_table.cpp",
            f"-std=c++17 {common} {flags} {define}",
        )
        link_to(out / f"libvqkernels_cpu_{name}{SUFFIX}", [table], exports)

    undefined = " -Wl,-undefined,dynamic_lookup" if sys.platform == "darwin" else ""
    includes = f"-isystem {torch / 'include'} -DTORCH_TARGET_VERSION={TORCH_TARGET}"
    objects = [
        compile_to(f"ops_{source.stem}.o", source, f"-std=c++20 {common} {includes}")
        for source in sorted((ROOT / "csrc/ops").glob("*.cpp"))
    ]
    link_to(
        out / f"libvqkernels_ops{SUFFIX}",
        objects,
        f"-L{torch / 'lib'} -ltorch_cpu -ldl{undefined}",
    )

    if with_development_module and importlib.util.find_spec("pybind11") is not None:
        import pybind11

        python = sysconfig.get_paths()["include"]
        flags = f"-std=c++17 {common} -isystem {pybind11.get_include()} -isystem {python}"
        module = compile_to("kernels_module.o", ROOT / "csrc/testing/kernels_module.cpp", flags)
        extension = sysconfig.get_config_var("EXT_SUFFIX")
        link_to(out / f"_kernels{extension}", [module], f"-ldl{undefined}")
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    """Runs ninja over `build_plan`; an in-place build gets the development module too."""

    def out_directory(self) -> Path:
        base = ROOT if self.inplace else Path(self.build_lib).resolve()
        return base / "vqkernels" / "lib"

    def run(self) -> None:
        wanted = os.environ.get("VQKERNELS_NATIVE", "auto")
        out = self.out_directory()
        out.mkdir(parents=True, exist_ok=True)
        problem = "VQKERNELS_NATIVE=0 asked for no native kernels" if wanted == "0" else None
        if problem is None:
            try:
                self.build(out)
            except NativeBuildError as error:
                if wanted == "1":
                    raise SystemExit(f"vqkernels: native build failed: {error}") from None
                problem = str(error)
        (out / "build.json").write_text(json.dumps({"problem": problem}) + "\n")
        if problem is not None:
            announce(problem)

    def build(self, out: Path) -> None:
        kind = "development" if self.inplace else "package"
        directory = ROOT / "build" / f"native-{kind}-{sysconfig.get_platform()}"
        directory.mkdir(parents=True, exist_ok=True)
        plan = build_plan(out, with_development_module=bool(self.inplace))
        (directory / "build.ninja").write_text(plan)
        command = [ninja(), "-C", str(directory)]
        if os.environ.get("MAX_JOBS"):
            command.append(f"-j{os.environ['MAX_JOBS']}")
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        if done.returncode != 0:
            raise NativeBuildError("the compiler failed:\n" + done.stdout[-4000:])

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.out_directory().glob("*") if path.is_file()]

    def get_source_files(self) -> list[str]:
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        return [str(path.relative_to(ROOT)) for path in sources]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an in-place build writes into the package at once."""


def announce(problem: str) -> None:
    """Say it where the user sees it: pip swallows the output of a build that succeeds."""
    bar = "=" * 78
    text = (
        f"\n{bar}\nvqkernels: NO NATIVE KERNELS WERE BUILT\n{problem}\n"
        f"The package works, on its slow PyTorch references. `vqkernels info` shows this too.\n"
        f"{bar}\n"
    )
    print(text, file=sys.stderr)
    with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
        terminal.write(text)


class PythonIndependentWheel(bdist_wheel):
    """No object in the wheel has a Python symbol, so one wheel serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("vqkernels.lib", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PythonIndependentWheel},
)
