"""A GPU run as text: ceilings, one short table an op, targets."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.records import Record, grouped
from benchmarks.report import aligned, number

from .targets import best_of_ours, is_ours, judge
from .timing import COLD, WARM


def render(records: Sequence[Record]) -> str:
    ceilings = [r for r in records if r.op == "ceiling"]
    cases = [r for r in records if r.op != "ceiling"]
    parts = [_ceilings(ceilings)]
    parts += [_table(op, [r for r in cases if r.op == op]) for op in _ops(cases)]
    parts += [_notes(cases), "\n".join(["Targets", *map(str, judge(records))])]
    return "\n\n".join(part for part in parts if part)


def _ops(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r.op for r in records))


def _ceilings(records: Sequence[Record]) -> str:
    if not records:
        return ""
    rates = (f"  {r.name} {r.dtype} ({r.shape}): {r.note}" for r in records)
    return "\n".join([records[0].device, records[0].versions, "ceilings", *rates])


def _table(op: str, records: Sequence[Record]) -> str:
    """A line for each row: warm times where there are any, else cold ones."""
    peers = list(dict.fromkeys(r.provider for r in records if not is_ours(r)))
    mode = WARM if any(r.mode == WARM for r in records) else COLD
    other = COLD if mode == WARM else ""
    title = f"{op}: our best kernel's ms, {mode}; its time / each peer's (peer's ms)"
    header = ["row", "dtype", "kernel", "ms", *([f"ms {other}"] if other else [])]
    header += ["floor", "peak MiB", *(f"/ {peer}" for peer in peers)]
    rows = grouped(records)
    lines = [header]
    for key, row in rows.items():
        if row[0].mode != mode:
            continue
        cold = rows.get((*key[:3], other, *key[4:]), [])
        lines.append(_cells(row, cold if other else None, peers))
    return "\n".join([title, *aligned(lines)])


def _cells(row: list[Record], cold: list[Record] | None, peers: Sequence[str]) -> list[str]:
    first, ours = row[0], best_of_ours(row)
    data = "" if first.data == "gaussian" else f" {first.data}"
    cells = [f"{first.name} {first.shape}{data}", first.dtype]
    if ours is None:
        cells += ["none", "", *([""] if cold is not None else []), "", ""]
    else:
        cells += [_kernel(ours), number(ours.ms_p50)]
        if cold is not None:
            same = next((r for r in cold if r.provider == ours.provider and r.timed), None)
            cells.append(number(same.ms_p50) if same else "-")
        share = ours.floor_share
        cells += ["-" if share != share else f"{share:.0%}", f"{ours.peak_mib:.0f}"]
    for peer in peers:
        record = next((r for r in row if r.provider == peer and r.timed), None)
        if record is None:
            cells.append("-")
        else:
            ratio = "-" if ours is None else f"{ours.ms_p50 / record.ms_p50:.2g}x"
            cells.append(f"{ratio} ({number(record.ms_p50)})")
    return cells


def _kernel(record: Record) -> str:
    return record.provider.partition("-")[2] or record.config


def _notes(records: Sequence[Record]) -> str:
    """Why a provider has no time, once for each reason."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record.note and not record.timed:
            place = f"{record.shape} {record.dtype}"
            places = reasons.setdefault(f"{record.provider}: {record.note[:110]}", [])
            places += [] if place in places else [place]
    lines = [
        f"  {reason} ({places[0]}{f' and {len(places) - 1} more' if places[1:] else ''})"
        for reason, places in reasons.items()
    ]
    return "\n".join(["Notes", *lines]) if lines else ""
