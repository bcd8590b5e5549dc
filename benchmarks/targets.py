"""The project's performance lines, judged on one run's records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .bench_attention import SDPA
from .bench_modulation import BOTH, COMPILED, EAGER, FORWARD, REUSED
from .bench_nearest_code import CALL_OVERHEAD, PACKING_INCLUDED
from .bench_noise import DIFFUSERS
from .bench_vector_quantize import PEER
from .case import OURS
from .records import Record, grouped, ratio

Row = list[Record]


@dataclass(frozen=True)
class Target:
    """`value(row)` over the rows that `applies` names has to keep to `limit`, the worst included.

    `value` is None for a row in which one of the two sides was not timed.
    """

    text: str
    limit: float
    at_most: bool
    unit: str
    applies: Callable[[Record], bool]
    value: Callable[[Row], float | None]

    def met(self, seen: float) -> bool:
        return seen <= self.limit if self.at_most else seen >= self.limit

    def worst(self, rows: Iterable[Row]) -> tuple[float, Record] | None:
        judged = [
            (value, row[0])
            for row in rows
            if self.applies(row[0]) and (value := self.value(row)) is not None
        ]
        pick = max if self.at_most else min
        return pick(judged, key=lambda pair: pair[0]) if judged else None


def _of(provider: str, row: Row) -> Record | None:
    return next((r for r in row if r.provider == provider and r.timed), None)


def _versus(peer: str) -> Callable[[Row], float | None]:
    return lambda row: ratio(row, OURS, peer)


def _floor_share(row: Row) -> float | None:
    ours = _of(OURS, row)
    return None if ours is None else ours.floor_share


def _memory_beyond_packed(row: Row) -> float | None:
    ours = _of(OURS, row)
    if ours is None or ours.peak_mib != ours.peak_mib:
        return None
    packed = 0.0 if ours.packed_mib != ours.packed_mib else ours.packed_mib
    return max(0.0, ours.peak_mib - packed)


def _microseconds(row: Row) -> float | None:
    ours = _of(OURS, row)
    return None if ours is None else 1e3 * ours.ms_p50


def _dimension(record: Record) -> int:
    return next(int(word[1:]) for word in record.shape.split() if word[0] == "D")


def _packing_included(low: int, high: float) -> Callable[[Record], bool]:
    def applies(record: Record) -> bool:
        packing = record.op == "nearest_code" and record.mode == PACKING_INCLUDED
        return packing and low <= _dimension(record) <= high

    return applies


def _row(op: str, name: str, *words: str) -> Callable[[Record], bool]:
    return lambda r: r.op == op and r.name == name and all(w in r.shape.split() for w in words)


def _attention(dtype: str, direction: str) -> Callable[[Record], bool]:
    """Rows of at least 256 tokens."""

    def applies(record: Record) -> bool:
        words = record.shape.split()
        short = any(w[0] == "N" and w[1:].isdigit() and int(w[1:]) < 256 for w in words)
        found = (record.op, record.dtype, record.mode)
        return found == ("attention", dtype, direction) and not short

    return applies


def _block(name: str, direction: str) -> Callable[[Record], bool]:
    block = _row("DiTBlock", name, "bfloat16")
    return lambda r: block(r) and r.mode == direction


def _versus_best(row: Row) -> float | None:
    ratios = [r for peer in (EAGER, COMPILED) if (r := ratio(row, OURS, peer)) is not None]
    return max(ratios) if ratios else None


def _in_cache(op: str, direction: str) -> Callable[[Record], bool]:
    """DiT-S/2's tokens fit a second-level cache of 4 MiB; outputs lie where they lay before."""
    return lambda r: (r.op, r.name, r.mode) == (op, "DiT-S/2", f"{direction}, {REUSED}")


def _nanoseconds_an_element(row: Row) -> float | None:
    ours = _of(OURS, row)
    if ours is None:
        return None
    return 1e6 * ours.ms_p50 / math.prod(map(int, ours.shape.split()[0].split("x")))


def _noise(op: str, dtype: str = "", samplers: tuple[str, ...] = ()) -> Callable[[Record], bool]:
    """Rows of one op, with outputs where the last ones lay."""

    def applies(record: Record) -> bool:
        sampler, _, memory = record.mode.rpartition(", ")
        here = record.op == op and memory == REUSED and dtype in ("", record.dtype)
        return here and (not samplers or sampler in samplers)

    return applies


TARGETS: tuple[Target, ...] = (
    Target(
        "nearest_code, D >= 64: at least 0.85 of the fp32 FMA rate",
        0.85,
        False,
        "",
        _packing_included(64, float("inf")),
        _floor_share,
    ),
    Target(
        "nearest_code, D = 256: at most 0.92x faiss",
        0.92,
        True,
        "x",
        _packing_included(256, 256),
        _versus("faiss"),
    ),
    Target(
        "nearest_code, 32 <= D <= 128: at most 0.85x faiss",
        0.85,
        True,
        "x",
        _packing_included(32, 128),
        _versus("faiss"),
    ),
    Target(
        "nearest_code, D = 8: at most 0.15x cdist + argmin",
        0.15,
        True,
        "x",
        _packing_included(8, 8),
        _versus("cdist"),
    ),
    Target(
        "nearest_code, (1024, 256, 262144): peak memory at most packed book + 64 MiB",
        64.0,
        True,
        " MiB beyond the packed book",
        _row("nearest_code", "ibq"),
        _memory_beyond_packed,
    ),
    Target(
        "VectorQuantize step, (4096, 256, 1024): at most 0.25x vector-quantize-pytorch",
        0.25,
        True,
        "x",
        _row("vector_quantize", "taming-f16", "N4096", "K1024"),
        _versus(PEER),
    ),
    Target(
        "VectorQuantize step, llamagen: at most 0.05x vector-quantize-pytorch",
        0.05,
        True,
        "x",
        _row("vector_quantize", "llamagen"),
        _versus(PEER),
    ),
    Target(
        "nearest_code, overhead of a call: under 15 us",
        15.0,
        True,
        " us",
        lambda record: record.op == "nearest_code" and record.mode == CALL_OVERHEAD,
        _microseconds,
    ),
    *(
        Target(
            f"attention, {dtype} {direction}, N >= 256: at most {limit}x SDPA",
            limit,
            True,
            "x",
            _attention(dtype, direction),
            _versus(SDPA),
        )
        for dtype, direction, limit in (
            ("bfloat16", FORWARD, 0.38),
            ("bfloat16", BOTH, 0.5),
            ("float32", FORWARD, 0.83),
            ("float32", BOTH, 0.83),
        )
    ),
    Target(
        "attention, bfloat16 forward, (32, 6, 16, 64): at most 0.25x SDPA",
        0.25,
        True,
        "x",
        lambda r: _row("attention", "DiT-S/8", "bfloat16")(r) and r.mode == FORWARD,
        _versus(SDPA),
    ),
    *(
        Target(
            f"qk_norm_rope: at most {limit}x {peer}",
            limit,
            True,
            "x",
            lambda r: r.op == "qk_norm_rope",
            _versus(peer),
        )
        for peer, limit in ((EAGER, 0.25), (COMPILED, 0.67))
    ),
    *(
        Target(
            f"{name} block, bfloat16 {direction}: at most {limit}x the better of eager and "
            "torch.compile",
            limit,
            True,
            "x",
            _block(name, direction),
            _versus_best,
        )
        for name, direction, limit in (
            ("DiT-S/2", FORWARD, 0.76),
            ("DiT-XL/2", FORWARD, 0.91),
            ("DiT-S/2", BOTH, 0.8),
        )
    ),
    *(
        Target(
            f"{op}, {direction}: at most {limit}x {peer}",
            limit,
            True,
            "x",
            _in_cache(op, direction),
            _versus(peer),
        )
        for op in ("ada_layer_norm", "gated_residual_ada_layer_norm")
        for direction in (FORWARD, BOTH)
        for peer, limit in ((EAGER, 0.25), (COMPILED, 0.5))
    ),
    *(
        Target(
            f"bias_gelu, {dtype} {direction}: at most {limit:.3g}x eager",
            limit,
            True,
            "x",
            lambda r, dtype=dtype, direction=direction: (  # type: ignore[misc]
                (r.op, r.dtype, r.mode) == ("bias_gelu", dtype, f"{direction}, {REUSED}")
            ),
            _versus(EAGER),
        )
        for dtype, direction, limit in (
            ("float32", FORWARD, 1 / 6),
            ("bfloat16", FORWARD, 1 / 8),
            ("float32", BOTH, 1 / 4),
            ("bfloat16", BOTH, 1 / 4),
        )
    ),
    *(
        Target(
            f"diffuse, {dtype}: at least {times}x as fast as diffusers",
            1 / times,
            True,
            "x",
            _noise("diffuse", dtype),
            _versus(DIFFUSERS),
        )
        for dtype, times in (("float32", 7), ("bfloat16", 8))
    ),
    Target(
        "diffuse: at most 0.62 ns an element",
        0.62,
        True,
        " ns",
        _noise("diffuse"),
        _nanoseconds_an_element,
    ),
    Target(
        "diffusion_loss, forward and backward: at least 5x as fast as eager",
        1 / 5,
        True,
        "x",
        _noise("diffusion_loss"),
        _versus(EAGER),
    ),
    *(
        Target(
            f"{' and '.join(samplers)} step: at least {times}x as fast as diffusers",
            1 / times,
            True,
            "x",
            _noise("scheduler_step", samplers=samplers),
            _versus(DIFFUSERS),
        )
        for samplers, times in (
            (("DDIM", "Euler", "flow Euler"), 8),
            (("guided DDPM",), 9),
            (("DPM++ 2M", "UniPC"), 6),
        )
    ),
    Target(
        "denoise_step, float32: at least 0.85 of the copy rate",
        0.85,
        False,
        "",
        _noise("denoise_step", "float32"),
        _floor_share,
    ),
    Target(
        "50-step loop: at least 10x as fast as diffusers",
        1 / 10,
        True,
        "x",
        _noise("sampling_loop"),
        _versus(DIFFUSERS),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """`seen` and `where` are the worst row's; None when no row could be judged."""

    target: Target
    threads: int
    seen: float | None
    where: str

    @property
    def passed(self) -> bool | None:
        return None if self.seen is None else self.target.met(self.seen)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        if self.seen is None:
            return f"  --   target: {self.target.text} ({threads}): not measured"
        word = "pass" if self.passed else "FAIL"
        seen = f"{self.seen:.3g}{self.target.unit}"
        return f"  {word} target: {self.target.text} ({threads}): seen {seen}, {self.where}"


def judge(records: Iterable[Record]) -> list[Verdict]:
    """One verdict for each target and number of threads that was measured."""
    records = list(records)
    verdicts = []
    for threads in sorted({record.threads for record in records}):
        rows = list(grouped(r for r in records if r.threads == threads).values())
        for target in TARGETS:
            worst = target.worst(rows)
            if worst is None:
                verdicts.append(Verdict(target, threads, None, ""))
            else:
                seen, record = worst
                where = f"{record.name} {record.shape}"
                where += " (other processes were busy: repeat)" if record.busy else ""
                verdicts.append(Verdict(target, threads, seen, where))
    return verdicts
