"""The one CSV schema of every benchmark."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = tuple[str, str, str, str, str, str, int]

NAN = float("nan")
BUSY_CORES = 0.3


@dataclass(frozen=True)
class Record:
    """One provider on one row, with one number of threads.

    Times are milliseconds of one call, memory is MiB. `floor_ms` is the least time the row's
    operations and bytes take at the ceilings measured in the same run; `floor_share` is floor_ms /
    ms_p50. `peak_mib` is the growth of the resident peak during one call; `packed_mib` the size
    of a packed book. `cores_busy_elsewhere` counts cores that other processes used meanwhile.
    A provider with no times has the reason in `note`.
    """

    op: str
    name: str
    shape: str
    mode: str
    dtype: str
    data: str
    threads: int
    provider: str
    config: str = ""
    ms_p20: float = NAN
    ms_p50: float = NAN
    ms_p80: float = NAN
    samples: int = 0
    peak_mib: float = NAN
    packed_mib: float = NAN
    floor_ms: float = NAN
    floor_share: float = NAN
    checked: int = 0
    mismatches: int = 0
    note: str = ""
    device: str = ""
    versions: str = ""
    load_average: float = NAN
    cores_busy_elsewhere: float = NAN

    @property
    def row(self) -> Row:
        """What the providers of one table row share."""
        return (
            self.op, self.name, self.shape, self.mode, self.dtype, self.data, self.threads,
        )  # fmt: skip

    @property
    def busy(self) -> bool:
        """Whether neighbours may have disturbed the row; barriers of 2 threads suffer most."""
        return self.cores_busy_elsewhere > BUSY_CORES

    @property
    def timed(self) -> bool:
        return self.samples > 0


FIELDS = tuple(field.name for field in dataclasses.fields(Record))
_KINDS = {"int": int, "float": float, "str": str}
_CONVERT = {field.name: _KINDS[str(field.type)] for field in dataclasses.fields(Record)}


def from_strings(row: dict[str, str]) -> Record:
    values: dict[str, Any] = {name: _CONVERT[name](row[name]) for name in FIELDS}
    return Record(**values)


def write_csv(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow({key: _cell(value) for key, value in vars(record).items()})


def read_csv(path: Path) -> list[Record]:
    with path.open(newline="") as file:
        return [from_strings(row) for row in csv.DictReader(file)]


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def grouped(records: Iterable[Record]) -> dict[Row, list[Record]]:
    """Records by table row, in their order."""
    rows: dict[Row, list[Record]] = {}
    for record in records:
        rows.setdefault(record.row, []).append(record)
    return rows


def ratio(rows: list[Record], provider: str, to: str) -> float | None:
    """`provider`'s median time over `to`'s, or None where one of them was not timed."""
    median = {record.provider: record.ms_p50 for record in rows if record.timed}
    if provider not in median or to not in median:
        return None
    return median[provider] / median[to]
