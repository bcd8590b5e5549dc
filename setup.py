"""Builds the native kernels with ninja. CPU: one shared object an instruction set, free of torch,
and one ops object over LibTorch's stable ABI, free of Python. CUDA: one object, kernels and ops.

Environment: VQKERNELS_NATIVE=1 makes a failed CPU build an error (default: build what can be
built, say loudly what could not); VQKERNELS_NATIVE=0 skips it. VQKERNELS_CUDA: auto (default)
builds where nvcc is found and torch has CUDA, 1 also against a torch without CUDA, and fails where
it can't, 0 does not. VQKERNELS_CUDA_ARCHS, such as "90a" or "80+PTX 90a", names other targets.
CXX and CUDACXX name the compilers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
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

# Machine code for each family of data-centre and consumer GPUs (that of 8.0 runs on 8.6 and 8.9
# too), and text that the driver translates for whatever comes: of 8.0, so that it fits all.
CUDA_TARGETS = "80+PTX 90a 100 120"
CUDA_OBJECT = "libvqkernels_cuda.so"
DEFAULT_NVCC = "/usr/local/cuda/bin/nvcc"


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


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    asked = os.environ.get("CUDACXX")
    folders = [f"{home}/bin/"] if home else []
    for name in [asked] if asked else [*(f + "nvcc" for f in folders), "nvcc", DEFAULT_NVCC]:
        if shutil.which(name.split()[0]):
            return name
    if asked:
        raise NativeBuildError(f"the compiler that CUDACXX names was not found: {asked!r}")
    raise NativeBuildError(
        f"nvcc was not found (looked at $CUDACXX, $CUDA_HOME/bin, $PATH, {DEFAULT_NVCC})"
    )


def torch_has_cuda() -> bool:
    """Read, not imported: that takes seconds."""
    version = (torch_directory() / "version.py").read_text()
    return re.search(r"^cuda\b[^=]*= *['\"]", version, re.MULTILINE) is not None


def toolkit_paths(compiler: str) -> tuple[list[str], list[str]]:
    """Where nvcc looks for headers and for libraries, as it says itself."""
    command = [*compiler.split(), "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    found: dict[str, list[str]] = {}
    for name, flag in (("INCLUDES", "-I"), ("LIBRARIES", "-L")):
        line = re.search(rf"^#\$ {name}=(.*)$", said, re.MULTILINE)
        words = shlex.split(line[1]) if line else []
        found[name] = [word[2:] for word in words if word.startswith(flag)]
        if not found[name]:
            raise NativeBuildError(f"{compiler} --dryrun does not say its {name}:\n{said}")
    return found["INCLUDES"], found["LIBRARIES"]


def cuda_targets() -> list[str]:
    asked = os.environ.get("VQKERNELS_CUDA_ARCHS") or CUDA_TARGETS
    targets = re.split(r"[\s,;]+", asked.strip())
    wrong = [name for name in targets if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", name)]
    if wrong:
        raise NativeBuildError(
            f'VQKERNELS_CUDA_ARCHS must be targets such as "80+PTX 90a", got {asked!r}'
        )
    return targets


class NinjaFile:
    """Rules, and what is compiled and linked by them."""

    def __init__(self) -> None:
        self.lines = [
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

    def compile(self, target: str, source: Path, flags: str, rule: str = "compile") -> str:
        self.lines += [f"build {target}: {rule} {source}", f"  flags = {flags}"]
        return target

    def link(self, target: Path, objects: list[str], libraries: str, after: str = "") -> None:
        also = f" | {after}" if after else ""
        self.lines += [f"build {target}: link {' '.join(objects)}{also}"]
        self.lines += [f"  libraries = {libraries}"]

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def ops_flags(torch: Path) -> str:
    return f"-std=c++20 -isystem {torch / 'include'} -DTORCH_TARGET_VERSION={TORCH_TARGET}"


def build_plan(out: Path, with_development_module: bool) -> str:
    """The CPU's ninja file: the kernel tables, the ops object, the development module."""
    torch = torch_directory()
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    capabilities = CAPABILITIES.get(machine, {"portable": ""})
    common = f"{COMMON} -DVQKERNELS_TABLE_VERSION={table_version()}"
    file = NinjaFile()

    # Nothing that was compiled for one instruction set, templates of the standard library
    # included, may be found by code that was compiled for another.
    exports = (
        "-Wl,-exported_symbol,_vqkernels_kernel_table"
        if sys.platform == "darwin"
        else f"-Wl,--version-script={ROOT / 'csrc/cpu/exports.map'}"
    )
    for name, flags in capabilities.items():
        define = f'-DVQKERNELS_CAPABILITY=\\"{name}\\"'
        table = file.compile(
            f"table_{name}.o",
            ROOT / "csrc/cpu/kernel_table.cpp",
            f"-std=c++17 {common} {flags} {define}",
        )
        file.link(out / f"libvqkernels_cpu_{name}{SUFFIX}", [table], exports)

    undefined = " -Wl,-undefined,dynamic_lookup" if sys.platform == "darwin" else ""
    objects = [
        file.compile(f"ops_{source.stem}.o", source, f"{common} {ops_flags(torch)}")
        for source in sorted((ROOT / "csrc/ops").glob("*.cpp"))
    ]
    file.link(
        out / f"libvqkernels_ops{SUFFIX}",
        objects,
        f"-L{torch / 'lib'} -ltorch_cpu -ldl{undefined}",
    )

    if with_development_module and importlib.util.find_spec("pybind11") is not None:
        import pybind11

        python = sysconfig.get_paths()["include"]
        flags = f"-std=c++17 {common} -isystem {pybind11.get_include()} -isystem {python}"
        module = file.compile("kernels_module.o", ROOT / "csrc/testing/kernels_module.cpp", flags)
        extension = sysconfig.get_config_var("EXT_SUFFIX")
        file.link(out / f"_kernels{extension}", [module], f"-ldl{undefined}")
    return file.text()


def cuda_plan(out: Path) -> str:
    """The ninja file of the CUDA object: kernels by nvcc, ops by the C++ compiler, and nothing that
    a machine has to bring but torch and the driver."""
    torch = torch_directory()
    cuda_compiler, targets = nvcc(), cuda_targets()
    includes, libraries = toolkit_paths(cuda_compiler)
    file = NinjaFile()
    file.lines += [
        f"nvcc = {cuda_compiler}",
        "rule compile_cuda",
        "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        # With the name of torch's library and nothing in it, so that an object can be linked where
        # that library is not.
        "rule stub",
        "  command = $cxx -shared -nostdlib -Wl,-soname,$out -x c++ /dev/null -o $out",
        "build libtorch_cuda.so: stub",
    ]
    code = []
    for target in targets:
        name, _, text = target.partition("+")
        virtual = f"compute_{name}"
        code.append(f"-gencode=arch={virtual},code=sm_{name}")
        if text:
            code.append(f"-gencode=arch={virtual},code={virtual}")
    # Where compute-sanitizer and profilers are to name a line, the code has to know it.
    flags = "-std=c++17 -O3 -fmad=false -lineinfo -Xfatbin=-compress-all"
    flags += f" -Xcompiler=-fPIC,-fvisibility=hidden {' '.join(code)}"
    if any(target.startswith("90a") for target in targets):
        flags += " -DVQKERNELS_SM90A"
    objects = [
        file.compile(f"{source.stem}.cu.o", source, flags, "compile_cuda")
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))
    ]
    toolkit = " ".join(f"-isystem {path}" for path in includes)
    define = f"-DUSE_CUDA -DVQKERNELS_CUDA_TARGETS='\"{' '.join(targets)}\"'"
    objects += [
        file.compile(
            f"ops_{source.stem}.o", source, f"{COMMON} {ops_flags(torch)} {toolkit} {define}"
        )
        for source in sorted((ROOT / "csrc/cuda/ops").glob("*.cpp"))
    ]
    file.link(
        out / CUDA_OBJECT,
        objects,
        f"-Wl,--version-script={ROOT / 'csrc/cuda/ops/exports.map'} "
        "-Wl,--no-as-needed -L. -ltorch_cuda -Wl,--as-needed "
        f"-L{torch / 'lib'} -ltorch_cpu {' '.join(f'-L{path}' for path in libraries)} "
        "-lcudart_static -lpthread -ldl -lrt",
        after="libtorch_cuda.so",
    )
    return file.text()


class BuildNative(build_ext):
    """Runs ninja over the plans; an in-place build gets the development module too."""

    def out_directory(self) -> Path:
        base = ROOT if self.inplace else Path(self.build_lib).resolve()
        return base / "vqkernels" / "lib"

    def run(self) -> None:
        out = self.out_directory()
        out.mkdir(parents=True, exist_ok=True)
        problem = self.build_for_cpu(out)
        cuda_problem = self.build_for_cuda(out)
        said = {"problem": problem, "cuda_problem": cuda_problem}
        (out / "build.json").write_text(json.dumps(said) + "\n")
        if problem is not None:
            announce(
                f"NO NATIVE KERNELS WERE BUILT\n{problem}\nThe package works, on its slow PyTorch "
                "references. `vqkernels info` shows this too."
            )

    def build_for_cpu(self, out: Path) -> str | None:
        """Why there are no kernels, if there are none."""
        wanted = setting("VQKERNELS_NATIVE")
        if wanted == "0":
            return "VQKERNELS_NATIVE=0 asked for no native kernels"
        try:
            self.run_ninja("native", build_plan(out, with_development_module=bool(self.inplace)))
        except NativeBuildError as error:
            if wanted == "1":
                raise SystemExit(f"vqkernels: native build failed: {error}") from None
            return str(error)
        return None

    def build_for_cuda(self, out: Path) -> str | None:
        """Why no CUDA object was built, if none was. One that lies there stays: where it can be
        used, it may have been built elsewhere."""
        wanted = setting("VQKERNELS_CUDA")
        if wanted == "0":
            return "VQKERNELS_CUDA=0 asked for no CUDA kernels"
        if wanted == "auto" and setting("VQKERNELS_NATIVE") == "0":
            return "VQKERNELS_NATIVE=0 asked for no native kernels"
        try:
            if sys.platform != "linux":
                raise NativeBuildError("CUDA kernels are built on Linux only")
            if wanted == "auto" and not torch_has_cuda():
                return (
                    "this torch was built without CUDA; VQKERNELS_CUDA=1 builds them all the same"
                )
            self.run_ninja("cuda", cuda_plan(out))
        except NativeBuildError as error:
            if wanted == "1":
                raise SystemExit(f"vqkernels: CUDA build failed: {error}") from None
            if not (out / CUDA_OBJECT).exists():
                announce(
                    f"NO CUDA KERNELS WERE BUILT\n{error}\nOn GPUs the package runs on Triton, "
                    "where that is installed. `vqkernels info` shows this too."
                )
            return str(error)
        return None

    def run_ninja(self, what: str, plan: str) -> None:
        kind = "development" if self.inplace else "package"
        directory = ROOT / "build" / f"{what}-{kind}-{sysconfig.get_platform()}"
        directory.mkdir(parents=True, exist_ok=True)
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


def setting(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"vqkernels: {name} must be auto, 0 or 1, got {value!r}")
    return value


def announce(message: str) -> None:
    """Say it where the user sees it: pip swallows the output of a build that succeeds."""
    bar = "=" * 78
    text = f"\n{bar}\nvqkernels: {message}\n{bar}\n"
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
