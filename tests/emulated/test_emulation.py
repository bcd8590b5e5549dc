"""The emulation finds each kind of fault by name, where it is, and lets correct kernels pass."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from emulator import (
    ORDERS,
    SELFTEST,
    TESTING,
    Emulator,
    KernelFaultError,
    asan_environment,
    build,
    modes,
)

SOURCE = TESTING / "emulation_selftest.cu"
MISSING_LANES = "collective with missing lanes"
EXITED = "barrier with exited threads"
UNINITIALIZED = "uninitialized read"
BOUNDS = "out of bounds"
MISALIGNED = "misaligned access"
SHARED_RACE = "race on shared memory"
GLOBAL_RACE = "race on global memory"
NO_WAIT = "missing wait for a copy"

# What each kernel's fault is called. `always`: also without memory checks.
ALWAYS = {
    "divergent_barrier": {"divergent barrier"},
    "barrier_after_exit": {EXITED},
    "exit_before_collective": {MISSING_LANES},
    "lane_in_barrier": {MISSING_LANES},
    "two_collectives": {MISSING_LANES},
    "shuffle_from_outside": {MISSING_LANES},
    "mask_without_caller": {MISSING_LANES},
    "deadlock": {"deadlock"},
    "misaligned_copy": {MISALIGNED},
    "misaligned_matrix_row": {MISALIGNED},
    "fewer_bytes_than_announced": {"deadlock"},
    "misaligned_codes": {"misaligned wgmma"},
}
CHECKED = {
    # Which of the two shows first depends on the order.
    "barrier_left_out": {UNINITIALIZED, SHARED_RACE},
    "endless": {"deadlock"},
    "global_read_out_of_bounds": {BOUNDS},
    "global_write_out_of_bounds": {BOUNDS},
    "dynamic_out_of_bounds": {BOUNDS},
    "static_out_of_bounds": {BOUNDS},
    "misaligned_global": {MISALIGNED},
    "misaligned_shared": {MISALIGNED},
    "uninitialized_global": {UNINITIALIZED},
    "uninitialized_shared": {UNINITIALIZED},
    "left_by_the_block_before": {UNINITIALIZED},
    "write_after_read": {SHARED_RACE},
    "read_after_write": {SHARED_RACE},
    "write_after_write": {SHARED_RACE},
    "neighbours_in_one_word": {SHARED_RACE},
    "warp_race": {SHARED_RACE},
    "half_warp_race": {SHARED_RACE},
    "warps_synced_apart": {SHARED_RACE},
    "race_between_blocks": {GLOBAL_RACE},
    "atomic_and_plain": {SHARED_RACE},
    "copy_without_wait": {NO_WAIT},
    "wait_for_the_wrong_group": {NO_WAIT},
    "copy_without_barrier": {SHARED_RACE, NO_WAIT},
    "copy_into_what_is_read": {SHARED_RACE, NO_WAIT},
    "copy_from_out_of_bounds": {BOUNDS},
    "bulk_copy_without_wait": {NO_WAIT},
    "bulk_copy_into_what_is_read": {SHARED_RACE, NO_WAIT},
    "products_of_what_threads_wrote": {"missing async proxy fence"},
}
# Seen by AddressSanitizer or UBSan, which end the process, or by the emulation with their help.
SANITIZED = {
    "global_read_out_of_bounds": "heap-buffer-overflow",
    "global_write_out_of_bounds": "heap-buffer-overflow",
    "dynamic_out_of_bounds": "heap-buffer-overflow",
    "static_out_of_bounds": "global-buffer-overflow",
    "misaligned_global": "misaligned address",
    "misaligned_shared": "misaligned address",
    "copy_from_out_of_bounds": BOUNDS,
}
EVERY_ORDER = [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]


def run_kernel(emulator: Emulator, name: str, broken: bool) -> np.ndarray:
    with emulator.memory() as memory:
        given = memory.array("in", np.arange(256, dtype=np.float32))
        out = memory.empty("out", (128,), np.float32)
        emulator.call(f"selftest_{name}", given, out, broken)
        return out.copy()


def marked_lines(name: str) -> set[str]:
    lines = SOURCE.read_text().splitlines()
    return {
        f"{SOURCE.name}:{number}"
        for number, line in enumerate(lines, 1)
        if line.endswith(f"// {name}")
    }


def line_of(text: str) -> int:
    lines = SOURCE.read_text().splitlines()
    (found,) = [number for number, line in enumerate(lines, 1) if line.endswith(text)]
    return found


def check_fault(message: str, name: str, kinds: set[str]) -> None:
    kind, place = message.split(":")[0], re.search(r"\n  at (\S+) in kernel (\S+),", message)
    assert kind in kinds, message
    assert place is not None
    assert place[1] in marked_lines(name), message
    assert place[2] == name
    assert re.search(r"block \(\d+,0,0\), thread \(\d+,0,0\)$", message)


def test_every_planted_fault_is_expected() -> None:
    planted = re.findall(r"^SELFTEST\((\w+)", SOURCE.read_text(), re.MULTILINE)
    assert sorted(planted) == sorted([*ALWAYS, *CHECKED])


@pytest.mark.parametrize(("order", "seed"), EVERY_ORDER)
@pytest.mark.parametrize("name", [*ALWAYS, *CHECKED])
def test_clean_kernels_pass(selftest: Emulator, name: str, order: str, seed: int) -> None:
    selftest.set_order(order, seed)
    out = run_kernel(selftest, name, broken=False)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(("order", "seed"), EVERY_ORDER)
@pytest.mark.parametrize("name", ALWAYS)
def test_divergence_is_named(selftest: Emulator, name: str, order: str, seed: int) -> None:
    selftest.set_order(order, seed)
    with pytest.raises(KernelFaultError) as caught:
        run_kernel(selftest, name, broken=True)
    check_fault(str(caught.value), name, ALWAYS[name])


@pytest.mark.skipif(modes() == ["asan"], reason="the sanitizers end the process; see below")
@pytest.mark.parametrize(("order", "seed"), EVERY_ORDER)
@pytest.mark.parametrize("name", CHECKED)
def test_memory_fault_is_named(checked: Emulator, name: str, order: str, seed: int) -> None:
    checked.set_order(order, seed)
    with pytest.raises(KernelFaultError) as caught:
        run_kernel(checked, name, broken=True)
    check_fault(str(caught.value), name, CHECKED[name])
    # The fault ends nothing but its launch.
    run_kernel(checked, name, broken=False)


@pytest.mark.skipif(modes() == ["asan"], reason="starts processes that load the sanitizers")
@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers_see(name: str) -> None:
    build("asan", SELFTEST)
    script = (
        "from emulator import SELFTEST, Emulator\n"
        "from test_emulation import run_kernel\n"
        "emulator = Emulator('asan', SELFTEST)\n"
        f"run_kernel(emulator, '{name}', broken=False)\n"
        "print('clean', flush=True)\n"
        f"run_kernel(emulator, '{name}', broken=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=asan_environment(),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stdout == "clean\n", done.stderr
    assert SANITIZED[name] in done.stderr
    assert any(place in done.stderr for place in marked_lines(name)), done.stderr


def test_builtins_votes_and_atomics(selftest: Emulator) -> None:
    threads = np.arange(60)
    odd_in_warp = [16, 14]  # of 32 and 28 lanes
    votes = (20 + np.take(odd_in_warp, threads // 32)) * 4 + 2
    for order, seed in EVERY_ORDER:
        selftest.set_order(order, seed)
        with selftest.memory() as memory:
            place = memory.empty("place", (720,), np.int32)
            voted = memory.empty("votes", (12, 60), np.int32)
            least = memory.array("least", np.array([2000], np.uint64))
            selftest.call("count_indices", place, voted, least)
            assert (place == np.arange(720)).all()
            assert (voted == votes).all()
            assert least[0] == 1000 - 59


def test_atomics_need_a_value_to_begin_with(checked: Emulator) -> None:
    with checked.memory() as memory:
        place, votes = (memory.empty(name, (720,), np.int32) for name in ("place", "votes"))
        least = memory.empty("least", (1,), np.uint64)
        with pytest.raises(KernelFaultError, match=r"uninitialized read: atomic update.*least"):
            checked.call("count_indices", place, votes, least)


def test_cleared_memory_can_be_read(checked: Emulator) -> None:
    with checked.memory() as memory:
        given = memory.array("in", np.arange(256, dtype=np.float32))
        out = memory.empty("out", (128,), np.float32)
        checked.call("clear", out, 508)
        with pytest.raises(
            KernelFaultError, match=r"uninitialized read.* at byte 508 of global out"
        ):
            checked.call("selftest_uninitialized_global", given, out, True)
        checked.call("clear", out, 512)
        checked.call("selftest_uninitialized_global", given, out, True)
        assert (out == np.tile(given[:64], 2)).all()
        with pytest.raises(KernelFaultError, match="cudaMemset out of bounds"):
            checked.call("clear", out, 513)


@pytest.mark.parametrize(("name", "dtype"), [("doubles", np.float64), ("ints", np.int32)])
def test_shuffles(selftest: Emulator, name: str, dtype: type) -> None:
    values = (np.arange(32) * 1.5 + 7).astype(dtype)
    lane = np.arange(32)
    in_half, in_group = lane % 16, lane % 8
    expected = [
        np.full(32, 5),
        lane - in_group + (lane + 3) % 8,
        np.where(in_half >= 3, lane - 3, lane),
        np.where(in_half + 3 < 16, lane + 3, lane),
        lane ^ 5,
        # A lane of a later group is out of reach, one of an earlier group is not.
        np.where((lane ^ 12) // 8 > lane // 8, lane, lane ^ 12),
    ]
    with selftest.memory() as memory:
        given = memory.array("in", values)
        out = memory.empty("out", (6, 32), dtype)
        selftest.call(f"shuffle_{name}", given, out)
        for row, lanes in zip(out, expected, strict=True):
            assert (row == values[lanes]).all()


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Of values that bfloat16 holds exactly."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def half_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint16)


def multiply(
    emulator: Emulator, a: np.ndarray, b: np.ndarray, c: np.ndarray, bfloat16: bool = False
) -> np.ndarray:
    bits = bfloat16_bits if bfloat16 else half_bits
    with emulator.memory() as memory:
        d = memory.empty("d", (16, 8), np.float32)
        emulator.call(
            "multiply",
            memory.array("a", bits(a)),
            memory.array("b", bits(b)),
            memory.array("c", c.astype(np.float32)),
            d,
            bfloat16,
        )
        return d.copy()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_mma_places_every_element(selftest: Emulator, bfloat16: bool) -> None:
    a = np.arange(256.0).reshape(16, 16)
    b = np.arange(128.0)[::-1].reshape(16, 8)
    c = np.arange(128.0).reshape(16, 8) * 1000
    assert (multiply(selftest, a, b, c, bfloat16) == a @ b + c).all()


def test_ldmatrix_gives_mma_its_fragments(selftest: Emulator) -> None:
    a = np.arange(256.0).reshape(16, 16)
    b = np.arange(128.0)[::-1].reshape(16, 8)
    with selftest.memory() as memory:
        d = memory.empty("d", (16, 8), np.float32)
        left, right = memory.array("a", half_bits(a)), memory.array("b", half_bits(b.T))
        selftest.call("load_tiles", left, right, d)
        assert (d == a @ b).all()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_half_an_mma_places_every_element(selftest: Emulator, bfloat16: bool) -> None:
    a = np.arange(128.0).reshape(16, 8)
    b = np.arange(64.0)[::-1].reshape(8, 8)
    c = np.arange(128.0).reshape(16, 8) * 1000
    bits = bfloat16_bits if bfloat16 else half_bits
    with selftest.memory() as memory:
        d = memory.empty("d", (16, 8), np.float32)
        left, right = memory.array("a", bits(a)), memory.array("b", bits(b.T))
        start = memory.array("c", c.astype(np.float32))
        selftest.call("multiply_half", left, right, start, d, bfloat16)
        assert (d == a @ b + c).all()


def test_ldmatrix_transposes(selftest: Emulator) -> None:
    """Two tiles at once, then the second alone."""
    a = np.arange(256.0).reshape(16, 16)
    b = np.arange(256.0)[::-1].reshape(16, 16) % 61
    with selftest.memory() as memory:
        d = memory.empty("d", (16, 24), np.float32)
        left, right = memory.array("a", half_bits(a)), memory.array("b", half_bits(b))
        selftest.call("load_transposed", left, right, d)
        assert (d == a @ np.concatenate([b, b[:, 8:]], 1)).all()


def first_element(emulator: Emulator, products: list[float], start: float) -> float:
    """start + sum(products) as the tensor core adds it."""
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    a[0, : len(products)] = products
    b[:, 0] = 1
    c = np.zeros((16, 8))
    c[0, 0] = start
    return float(multiply(emulator, a, b, c)[0, 0])


def test_mma_truncates(selftest: Emulator) -> None:
    # Terms are cut off below 24 bits of the largest, one by one,
    assert first_element(selftest, [2.0**-24] * 8, 1) == 1
    assert first_element(selftest, [1.5 * 2.0**-23] * 8, 1) == 1 + 2.0**-20
    assert first_element(selftest, [-1.5 * 2.0**-23] * 8, 1) == 1 - 2.0**-20
    # and so is the sum, toward zero: to the nearest it would be 2 + 2**-21.
    assert first_element(selftest, [1.0], 1 + 3 * 2.0**-23) == 2 + 2.0**-22
    assert first_element(selftest, [-1.0], -1 - 3 * 2.0**-23) == -2 - 2.0**-22
    # Eight products at a time: those that come second meet the first ones' sum.
    assert first_element(selftest, [2.0**-24] * 8 + [0.0] * 7 + [1.0], 0) == 1 + 2.0**-21
    assert first_element(selftest, [1.0] + [0.0] * 7 + [2.0**-24] * 8, 0) == 1


def cut_off(value: Fraction, unit: Fraction) -> Fraction:
    """The multiple of `unit` next to `value`, toward zero."""
    return int(abs(value) / unit) * unit * (1 if value > 0 else -1)


def last_place(value: Fraction) -> Fraction:
    """What the last of 24 bits is worth in a number of this size."""
    exponent = math.frexp(float(abs(value)))[1] - 1
    return Fraction(2) ** (exponent - 23)


def added(start: Fraction, products: list[Fraction]) -> Fraction:
    unit = last_place(max([start, *products], key=abs))
    total = sum((cut_off(term, unit) for term in [start, *products]), Fraction(0))
    return cut_off(total, last_place(total)) if total else total


def test_mma_rounds_as_the_model_says(selftest: Emulator) -> None:
    generator = np.random.default_rng(0)
    a, b = (
        (generator.standard_normal(shape) * 2.0 ** generator.integers(-9, 5, shape))
        .astype(np.float16)
        .astype(np.float64)
        for shape in [(16, 16), (16, 8)]
    )
    c = generator.standard_normal((16, 8)).astype(np.float32)
    found = multiply(selftest, a, b, c)
    for row, column in itertools.product(range(16), range(8)):
        total = Fraction(float(c[row, column]))
        for k in (0, 8):
            left, right = a[row, k : k + 8], b[k : k + 8, column]
            total = added(
                total, [Fraction(x) * Fraction(y) for x, y in zip(left, right, strict=True)]
            )
        assert float(found[row, column]) == total
    assert (found != (a @ b + c).astype(np.float32)).any()


@pytest.mark.parametrize("start", [np.inf, -np.inf, np.nan])
def test_mma_passes_on_what_is_not_finite(selftest: Emulator, start: float) -> None:
    assert np.array_equal(first_element(selftest, [1.0, -2.0], start), start, equal_nan=True)
    assert np.isnan(first_element(selftest, [-np.inf], np.inf))


def block_sum(emulator: Emulator) -> np.ndarray:
    with emulator.memory() as memory:
        given = memory.array("in", np.ones(1000, np.float32))
        out = memory.empty("out", (3,), np.float32)
        emulator.call("sum", given, out, 1000)
        return out.copy()


@pytest.mark.parametrize("barrier", ["// first barrier", "// inner barrier"])
def test_a_barrier_can_be_disabled(checked: Emulator, barrier: str) -> None:
    for order, seed in EVERY_ORDER:
        checked.set_order(order, seed)
        with checked.disabled(SOURCE.name, line_of(barrier)):
            with pytest.raises(KernelFaultError, match=rf"{SHARED_RACE}|{UNINITIALIZED}"):
                block_sum(checked)
            assert checked.times_disabled > 0
        assert (block_sum(checked) == 1000).all()


@pytest.mark.skipif(modes() == ["asan"], reason="the C library's fibers, without sanitizers")
def test_other_processors_fibers() -> None:
    emulator = Emulator("ucontext", SELFTEST)
    for order, seed in EVERY_ORDER:
        emulator.set_order(order, seed)
        assert (block_sum(emulator) == 1000).all()
        with pytest.raises(KernelFaultError) as caught:
            run_kernel(emulator, "exit_before_collective", broken=True)
        check_fault(str(caught.value), "exit_before_collective", {MISSING_LANES})


def test_wrong_launches_are_refused(selftest: Emulator) -> None:
    for threads, shared in itertools.product([1, 64, 1024, 1025], [0, 227 << 10, (227 << 10) + 1]):
        with selftest.memory() as memory:
            given = memory.array("in", np.zeros(1024, np.float32))
            out = memory.empty("out", (1024,), np.float32)
            if threads <= 1024 and shared <= 227 << 10:
                selftest.call("launch", given, out, threads, shared)
                continue
            with pytest.raises(KernelFaultError, match="no device launches barrier_after_exit"):
                selftest.call("launch", given, out, threads, shared)


def test_the_hosts_variables_are_left_alone(selftest: Emulator) -> None:
    with selftest.memory() as memory:
        given = memory.array("in", np.zeros(256, np.float32))
        out = memory.empty("out", (128,), np.float32)
        launches = np.zeros(2, np.int64)
        selftest.call("count_launches", given, out, launches[:1])
        selftest.call("count_launches", given, out, launches[1:])
        assert launches[1] == launches[0] + 1 >= 2


def test_memory_that_nobody_registered(checked: Emulator) -> None:
    checked.set_order("forward")
    with checked.memory() as memory:
        given = np.zeros(256, np.float32)
        out = memory.empty("out", (128,), np.float32)
        with pytest.raises(KernelFaultError, match=BOUNDS):
            checked.call("selftest_write_after_read", given, out, False)
        checked.register(given, "given")
        checked.call("selftest_write_after_read", given, out, False)
        checked.unregister(given)


def test_all_orders_exist() -> None:
    assert {order for order, _ in EVERY_ORDER} == set(ORDERS)
