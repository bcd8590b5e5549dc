"""What a GPU run has to show, judged on its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.bench_modulation import COMPILED
from benchmarks.bench_modulation import EAGER as EAGER_MODULATION
from benchmarks.case import OURS
from benchmarks.records import Record, grouped

from .noise import NOISE_OPS
from .peers import FLASH, MATMUL
from .timing import WARM

# Milliseconds of flash-kmeans' Triton assignment on an H100 as its authors publish them, fp16,
# N = 65536, by (D, K): used where the package is not there to be measured.
PUBLISHED = {(256, 1024): 0.110, (256, 16384): 1.394, (64, 1024): 0.0488, (64, 16384): 0.614}
_TOKENS = 65536
_HALVES = ("float16", "bfloat16")
# A search that formed N x K scores would need at least 2 bytes for each.
_MATRIX_BYTES, _MATRIX_SHARE = 2, 1 / 8

# Rows of the modulation and of the noise ops below these fit into an L2.
_NOISE_ELEMENTS = 1 << 25
_MODULATION_ELEMENTS = 1 << 24

Row = list[Record]


@dataclass(frozen=True)
class Seen:
    value: float
    where: str


@dataclass(frozen=True)
class Target:
    """`worst(rows)` is the worst row's value, or None where no row can be judged."""

    text: str
    limit: float
    at_most: bool
    unit: str
    worst: Callable[[list[Row]], Seen | None]


@dataclass(frozen=True)
class Verdict:
    target: Target
    seen: Seen | None

    @property
    def met(self) -> bool | None:
        if self.seen is None:
            return None
        value, limit = self.seen.value, self.target.limit
        return value <= limit if self.target.at_most else value >= limit

    def __str__(self) -> str:
        if self.seen is None:
            return f"  --       {self.target.text}: not measured"
        word = "met    " if self.met else "NOT MET"
        unit = self.target.unit
        return f"  {word}  {self.target.text}: {self.seen.value:.3g}{unit} ({self.seen.where})"


def is_ours(record: Record) -> bool:
    return record.provider.startswith(OURS)


def best_of_ours(row: Row) -> Record | None:
    return min((r for r in row if is_ours(r) and r.timed), key=lambda r: r.ms_p50, default=None)


def timed(row: Row, provider: str) -> Record | None:
    return next((r for r in row if r.provider == provider and r.timed), None)


def sizes(record: Record) -> dict[str, int]:
    """N, D and K of a row's shape, `N65536 D256 K1024 l2`."""
    words = (word for word in record.shape.split() if word[0] in "NDK" and word[1:].isdigit())
    return {word[0]: int(word[1:]) for word in words}


def _is_target(record: Record, dtypes: tuple[str, ...], **wanted: int) -> bool:
    found = sizes(record)
    return (
        record.op == "nearest_code"
        and record.name == "target"
        and record.mode == WARM
        and record.dtype in dtypes
        and found["N"] == _TOKENS
        and all(found[letter] == value for letter, value in wanted.items())
    )


def _where(record: Record, rest: str = "") -> str:
    parts = [record.provider, record.shape, record.dtype, rest]
    return ", ".join(filter(None, parts))


def _worst(values: Iterable[Seen | None], *, at_most: bool) -> Seen | None:
    found = [seen for seen in values if seen is not None]
    pick = max if at_most else min
    return pick(found, key=lambda seen: seen.value) if found else None


def _versus_flash(dim: int, codebook_size: int) -> Callable[[list[Row]], Seen | None]:
    def judge_row(row: Row) -> Seen | None:
        ours, flash = best_of_ours(row), timed(row, FLASH)
        if ours is None:
            return None
        published = PUBLISHED[dim, codebook_size]
        theirs = published if flash is None else flash.ms_p50
        source = "published for an H100" if flash is None else "measured"
        rest = f"{ours.ms_p50:.4g} ms against {theirs:.4g} ms, {source}"
        return Seen(ours.ms_p50 / theirs, _where(ours, rest))

    def worst(rows: list[Row]) -> Seen | None:
        wanted = [r for r in rows if _is_target(r[0], ("float16",), D=dim, K=codebook_size)]
        return _worst(map(judge_row, wanted), at_most=True)

    return worst


def rate_of(rows: list[Row], name: str, dtype: str) -> float | None:
    """A ceiling's operations a second, as its record's note holds them."""
    for row in rows:
        if (row[0].op, row[0].name, row[0].dtype) == ("ceiling", name, dtype):
            return 1e9 * float(row[0].note.split()[0])
    return None


def _share_of_mma(rows: list[Row]) -> Seen | None:
    def share(row: Row) -> Seen | None:
        cuda = timed(row, f"{OURS}-cuda")
        rate = rate_of(rows, "mma.sync", row[0].dtype)
        if cuda is None or rate is None or not _is_target(row[0], _HALVES):
            return None
        n = sizes(cuda)
        reached = 2.0 * n["N"] * n["D"] * n["K"] / (1e-3 * cuda.ms_p50)
        return Seen(reached / rate, _where(cuda, f"{reached / 1e12:.3g} TFLOP/s"))

    return _worst(map(share, rows), at_most=False)


def _versus_matmul(rows: list[Row]) -> Seen | None:
    def ratio(row: Row) -> Seen | None:
        ours, theirs = best_of_ours(row), timed(row, MATMUL)
        if ours is None or theirs is None or not _is_target(row[0], ("float32",)):
            return None
        if sizes(ours)["D"] <= 16:
            return None
        return Seen(ours.ms_p50 / theirs.ms_p50, _where(ours, f"{row[0].data} data"))

    return _worst(map(ratio, rows), at_most=True)


def _versus_floor(rows: list[Row]) -> Seen | None:
    def ratio(row: Row) -> Seen | None:
        ours = best_of_ours(row)
        if ours is None or not _is_target(row[0], ("float32",), D=8, K=16384):
            return None
        if ours.floor_ms != ours.floor_ms:
            return None
        return Seen(ours.ms_p50 / ours.floor_ms, _where(ours, f"floor {ours.floor_ms:.3g} ms"))

    return _worst(map(ratio, rows), at_most=True)


def _wrong(rows: list[Row]) -> Seen | None:
    """Rows of ours that were refused or failed."""
    ours = [r for row in rows for r in row if is_ours(r)]
    bad = [r for r in ours if not r.timed]
    if not ours:
        return None
    return Seen(float(len(bad)), bad[0].note if bad else f"{len(ours)} of them")


def _memory(rows: list[Row]) -> Seen | None:
    def share(record: Record) -> Seen | None:
        found = sizes(record)
        if record.op != "nearest_code" or not is_ours(record) or not record.timed:
            return None
        if record.peak_mib != record.peak_mib or found["K"] < 16384 or found["N"] < 16384:
            return None
        matrix = found["N"] * found["K"] * _MATRIX_BYTES / 2**20
        return Seen(record.peak_mib / matrix, _where(record, f"{record.peak_mib:.0f} MiB"))

    return _worst((share(record) for row in rows for record in row), at_most=True)


def _is_norm(row: Row) -> bool:
    """A row of LN + modulate, gated or not, too large for any L2."""
    words = (word for word in row[0].shape.split() if word[0] in "BND" and word[1:].isdigit())
    elements = math.prod(int(word[1:]) for word in words)
    known = row[0].op.partition(",")[0] in ("ada_layer_norm", "gated_residual_ada_layer_norm")
    return known and row[0].mode == WARM and elements >= _MODULATION_ELEMENTS


def _share_of_copy(rows: list[Row]) -> Seen | None:
    def share(row: Row) -> Seen | None:
        ours = best_of_ours(row)
        if ours is None or not _is_norm(row):
            return None
        return Seen(ours.floor_share, _where(ours, ours.op))

    return _worst(map(share, rows), at_most=False)


def _noise_share_of_copy(rows: list[Row]) -> Seen | None:
    def share(row: Row) -> Seen | None:
        ours = best_of_ours(row)
        if ours is None or row[0].op not in NOISE_OPS or row[0].mode != WARM:
            return None
        large = math.prod(map(int, row[0].shape.split("x"))) >= _NOISE_ELEMENTS
        return Seen(ours.floor_share, _where(ours, ours.op)) if large else None

    return _worst(map(share, rows), at_most=False)


def _versus_peer(peer: str) -> Callable[[list[Row]], Seen | None]:
    def ratio(row: Row) -> Seen | None:
        ours, theirs = best_of_ours(row), timed(row, peer)
        if ours is None or theirs is None or not _is_norm(row):
            return None
        return Seen(theirs.ms_p50 / ours.ms_p50, _where(ours, ours.op))

    return lambda rows: _worst(map(ratio, rows), at_most=False)


TARGETS: tuple[Target, ...] = (
    *(
        Target(
            f"fp16, N = 65536, D = {dim}, K = {size}: at most {limit}x flash-kmeans",
            limit,
            True,
            "x",
            _versus_flash(dim, size),
        )
        for dim, limit in ((256, 0.67), (64, 0.5))
        for size in (1024, 16384)
    ),
    Target(
        "halves, N = 65536: CUDA at least 0.85 of the mma.sync ceiling",
        0.85,
        False,
        "",
        _share_of_mma,
    ),
    Target(
        "fp32, N = 65536: at most 0.25x matmul + argmin without TF32",
        0.25,
        True,
        "x",
        _versus_matmul,
    ),
    Target(
        "fp32, N = 65536, D = 8, K = 16384: at most 2x the epilogue floor",
        2.0,
        True,
        "x",
        _versus_floor,
    ),
    Target("memory: at most 1/8 of N x K halves", _MATRIX_SHARE, True, "", _memory),
    *(
        Target(f"adaLN forms: {what}", limit, False, unit, worst)
        for what, limit, unit, worst in (
            ("at least 0.85 of the copy rate", 0.85, "", _share_of_copy),
            ("at least 3x as fast as eager", 3.0, "x", _versus_peer(EAGER_MODULATION)),
            ("at least 1.2x as fast as torch.compile", 1.2, "x", _versus_peer(COMPILED)),
        )
    ),
    Target(
        "noising and sampler steps: at least 0.85 of the copy rate",
        0.85,
        False,
        "",
        _noise_share_of_copy,
    ),
    Target("results outside float64's bound, or failed", 0.0, True, "", _wrong),
)


def judge(records: Iterable[Record]) -> list[Verdict]:
    rows = list(grouped(records).values())
    return [Verdict(target, target.worst(rows)) for target in TARGETS]
