"""Builds CUDA sources with the emulation of csrc/testing and calls them on NumPy arrays.

The builds, in build/emulated: "plain" for results, "race" for every memory fault and race,
"asan" for AddressSanitizer and UBSan, which needs their libraries loaded first
(`asan_environment`). All of them report divergent barriers, missing lanes and deadlocks.
"ucontext" is "plain" with the C library's fibers, which processors other than x86-64 use.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
TESTING = CSRC / "testing"
BUILD = ROOT / "build" / "emulated"

COMMON = ["-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
COMMON += ["-Wall", "-Wno-unknown-pragmas"]  # #pragma unroll
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Variables of templates must not be shared between the builds that one process has loaded.
OF_KERNELS = ["-fno-gnu-unique"]
# (of the emulation, of the kernels); `race` takes the kernels' accesses one by one as written
FLAGS = {
    "plain": (["-O3"], ["-O2"]),
    "ucontext": (["-O2", "-DEMULATION_UCONTEXT"], ["-O2"]),
    "race": (["-O3"], ["-O1", "-fno-tree-sra", "-fsanitize=thread"]),
    "asan": (["-O1", *SANITIZERS], ["-O1", *SANITIZERS]),
}
SELFTEST = (TESTING / "emulation_selftest.cu",)
KERNELS = (*sorted(TESTING.glob("emulated_*.cpp")), *sorted((CSRC / "cuda").glob("*.cu")))
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


class KernelFaultError(Exception):
    """What the emulation found wrong with a kernel."""


@functools.cache
def compiler() -> tuple[str, ...]:
    """GCC: Clang drops and splits accesses before it reports them, and the race build would see
    less."""
    for name in (os.environ.get("CXX", "g++"), "g++"):
        command = tuple(name.split())
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        if "Free Software Foundation" in done.stdout and sys.platform == "linux":
            return command
    raise FileNotFoundError(
        "the emulation of CUDA needs g++ on Linux; install it, or name it in CXX"
    )


@functools.cache
def headers() -> str:
    """A digest of everything that a source file can include."""
    digest = hashlib.sha256()
    for folder in ("common", "cuda", "testing"):
        for path in sorted((CSRC / folder).glob("*.h")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def emulation_sources() -> list[Path]:
    return sorted(TESTING.glob("cuda_emulation*.cpp"))


def compiled(source: Path, flags: list[str]) -> Path:
    command = [*compiler(), *COMMON, *flags, "-x", "c++", "-c", str(source)]
    seen = headers()
    if source in emulation_sources():  # these include nothing of the kernels
        seen = "".join(path.read_text() for path in sorted(TESTING.glob("cuda_emulation*.h")))
    seen += source.read_text()
    name = hashlib.sha256((seen + " ".join(command)).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}-{name}.o"
    if not target.exists():
        partial = f"{target}.{os.getpid()}.{threading.get_ident()}"
        run([*command, "-o", partial])
        os.replace(partial, target)
    return target


def run(command: list[str]) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-6000:]}")


def build(mode: str, sources: tuple[Path, ...]) -> Path:
    emulation, kernels = FLAGS[mode]
    flags = dict.fromkeys(emulation_sources(), emulation)
    flags |= {path: [*OF_KERNELS, *kernels] for path in sources}
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
        objects = list(pool.map(compiled, flags.keys(), flags.values()))
    name = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    target = BUILD / f"libvqkernels_{sources[0].stem}_{mode}-{name}.so"
    if not target.exists():
        # Not -fsanitize=thread: the emulation's callbacks stand in for that library.
        sanitizers = SANITIZERS if mode == "asan" else []
        partial = f"{target}.{os.getpid()}.{threading.get_ident()}"
        libraries = ["-ldl", "-lpthread"]
        run([*compiler(), "-shared", *sanitizers, *map(str, objects), *libraries, "-o", partial])
        os.replace(partial, target)
    return target


def asan_environment() -> dict[str, str]:
    """Variables for a Python process that loads "asan" builds."""
    libraries = []
    for library in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            [*compiler(), f"-print-file-name={library}"], capture_output=True, text=True
        ).stdout.strip()
        if not os.path.isabs(found):
            raise FileNotFoundError(f"{library} of {compiler()[0]} was not found")
        libraries.append(os.path.realpath(found))
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "VQKERNELS_EMULATION": "asan",
    }


def modes() -> list[str]:
    """The builds that this process can load."""
    return ["asan"] if os.environ.get("VQKERNELS_EMULATION") == "asan" else ["plain", "race"]


class Memory:
    """Arrays as a device would hold them: aligned, with nothing known beyond their ends."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        self._blocks: list[int] = []

    def empty(
        self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike, initialized: bool = False
    ) -> npt.NDArray[Any]:
        """An array that holds garbage, and may not be read before it is written."""
        kind = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        size = count * kind.itemsize
        address = self._library.emulation_allocate(size)
        self._blocks.append(address)
        self._library.emulation_register(address, size, int(initialized), name.encode())
        buffer = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(buffer, kind, count).reshape(shape)

    def array(self, name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
        """A copy of `values`."""
        given = np.asarray(values)
        copy = self.empty(name, given.shape, given.dtype, initialized=True)
        copy[...] = given
        return copy

    def free(self) -> None:
        for address in self._blocks:
            self._library.emulation_free(address)
        self._blocks.clear()


class Emulator:
    """The entry points of some source files, in one build.

    Entry points are `extern "C"` functions that return a message, or null where all went well
    (`emulation::caught`).
    """

    def __init__(self, mode: str, sources: tuple[Path, ...] = KERNELS):
        self.mode = mode
        self.library = ctypes.CDLL(str(build(mode, sources)))
        self._declared: list[Any] = []
        declare = {
            "register": ("p", "qip", None),
            "unregister": ("p", "", None),
            "allocate": ("q", "", ctypes.c_void_p),
            "free": ("p", "", None),
            "set_order": ("i", "Q", None),
            "disable": ("p", "i", None),
            "enable_all": ("", "", None),
            "times_disabled": ("", "", ctypes.c_int64),
            "times_reached": ("p", "i", ctypes.c_int64),
            "forget_reached": ("", "", None),
        }
        kinds = {
            "p": ctypes.c_void_p,
            "q": ctypes.c_int64,
            "i": ctypes.c_int,
            "Q": ctypes.c_uint64,
        }
        for name, (first, rest, result) in declare.items():
            function = getattr(self.library, f"emulation_{name}")
            function.argtypes = [kinds[letter] for letter in first + rest]
            function.restype = result

    @contextlib.contextmanager
    def memory(self) -> Iterator[Memory]:
        memory = Memory(self.library)
        try:
            yield memory
        finally:
            memory.free()

    def register(self, array: npt.NDArray[Any], name: str, initialized: bool = True) -> None:
        """Lets kernels use an array of NumPy's own; it must outlive them."""
        if not array.flags.c_contiguous:
            raise ValueError("register the array that the view belongs to")
        self.library.emulation_register(
            array.ctypes.data, array.nbytes, int(initialized), name.encode()
        )

    def unregister(self, array: npt.NDArray[Any]) -> None:
        self.library.emulation_unregister(array.ctypes.data)

    def declare(self, tensor: Any, initialized: bool, name: str = "tensor") -> None:
        """Lets kernels use the memory of a torch tensor on the CPU, until `forget`."""
        storage = tensor.untyped_storage()
        self._declared.append(storage)
        self.library.emulation_register(
            storage.data_ptr(), storage.nbytes(), int(initialized), name.encode()
        )

    def forget(self) -> None:
        for storage in self._declared:
            self.library.emulation_unregister(storage.data_ptr())
        self._declared.clear()

    def release(self) -> None:
        """Gives back the threads' stacks, of whose mappings a process has room for some thirty
        emulators; the next launch makes them anew."""
        self.library.emulation_release_stacks()

    def set_order(self, order: str, seed: int = 0) -> None:
        """The order that threads run in: forward, reverse or shuffled."""
        self.library.emulation_set_order(ORDERS[order], seed)

    @contextlib.contextmanager
    def disabled(self, file: str, line: int) -> Iterator[None]:
        """Without the barrier or cp_async_wait at this place."""
        self.library.emulation_disable(file.encode(), line)
        try:
            yield
        finally:
            self.library.emulation_enable_all()

    @property
    def times_disabled(self) -> int:
        """How often a place that is disabled was reached."""
        return int(self.library.emulation_times_disabled())

    def times_reached(self, file: str, line: int) -> int:
        """How often the barrier or cp_async_wait at this place was reached since
        `forget_reached`."""
        return int(self.library.emulation_times_reached(file.encode(), line))

    def forget_reached(self) -> None:
        self.library.emulation_forget_reached()

    def call(self, name: str, *arguments: object) -> None:
        """Calls an entry point; raises KernelFaultError with its message.

        Arrays and None become pointers, ints int64_t, floats double; ctypes values stay as they
        are.
        """
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*[_converted(argument) for argument in arguments])
        if message is not None:
            raise KernelFaultError(message.decode())


def _converted(argument: object) -> Any:
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, bool | int | np.integer):
        return ctypes.c_int64(int(argument))
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return argument
