"""A run's records as text: ceilings, one table per op and number of threads, verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from .case import OURS
from .records import Record, grouped, ratio
from .targets import judge


def render(records: Sequence[Record]) -> str:
    parts = [_ceilings([r for r in records if r.op == "ceiling"])]
    cases = [r for r in records if r.op != "ceiling"]
    for op, threads in dict.fromkeys((r.op, r.threads) for r in cases):
        table = [r for r in cases if (r.op, r.threads) == (op, threads)]
        parts.append(_table(op, threads, table))
    parts.append(_notes(cases))
    parts.append("\n".join(["Targets", *map(str, judge(cases))]))
    return "\n\n".join(part for part in parts if part)


def _ceilings(records: Sequence[Record]) -> str:
    if not records:
        return ""
    lines = [records[0].device, records[0].versions]
    for threads in dict.fromkeys(r.threads for r in records):
        rates = ", ".join(
            f"{r.name} {r.dtype} ({r.shape}) {r.note}" for r in records if r.threads == threads
        )
        lines.append(f"ceilings, {_threads(threads)}: {rates}")
    return "\n".join(lines)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _table(op: str, threads: int, records: Sequence[Record]) -> str:
    peers = list(dict.fromkeys(r.provider for r in records if r.provider != OURS))
    header = ["row", "mode", "ms (p20-p80)", "floor", "peak MiB"]
    header += [f"/ {peer}" for peer in peers] + ["mismatches", "load"]
    rows = [_cells(row, peers) for row in grouped(records).values()]
    title = (
        f"{op}, {_threads(threads)}: our time; share of the fp32 floor reached (a search screened "
        "in lower precision\nand re-checked can pass 100%); our time / each peer's (peer's ms)"
    )
    return "\n".join([title, *aligned([header, *rows])])


def _cells(row: list[Record], peers: Sequence[str]) -> list[str]:
    by_provider = {record.provider: record for record in row}
    any_record = row[0]
    ours = by_provider.get(OURS)
    cells = [f"{any_record.name} {any_record.shape}", any_record.mode]
    if ours is not None and ours.timed:
        spread = f"({number(ours.ms_p20)}-{number(ours.ms_p80)})"
        cells += [f"{number(ours.ms_p50)} {spread}", f"{ours.floor_share:.0%}"]
        cells += [f"{ours.peak_mib:.0f}"]
    else:
        cells += ["not timed", "", ""]
    for peer in peers:
        versus = ratio(row, OURS, peer)
        record = by_provider.get(peer)
        if record is None or not record.timed:
            cells.append("-")
        else:
            shown = "-" if versus is None else f"{versus:.2g}x"
            cells.append(f"{shown} ({number(record.ms_p50)})")
    wrong = [f"{r.mismatches}" for r in row if r.provider == OURS or r.mismatches]
    cells.append("+".join(wrong) + f" of {max(r.checked for r in row)}")
    cells.append(f"{any_record.load_average:.1f}{' BUSY' if any_record.busy else ''}")
    return cells


def number(value: float) -> str:
    if value < 0.1:
        return f"{value:.4f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_padded(row, widths) for row in rows]


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    pairs = zip(cells, widths, strict=True)
    return "  ".join(cell.ljust(width) for cell, width in pairs).rstrip()


def _notes(records: Sequence[Record]) -> str:
    lines = [
        f"  {r.provider} on {r.name} {r.shape}, {_threads(r.threads)}: {r.note}"
        for r in records
        if r.note
    ]
    busiest = max((r.cores_busy_elsewhere for r in records if r.busy), default=0.0)
    if busiest:
        lines.append(f"  BUSY: other processes kept up to {busiest:.1f} cores busy in these rows")
    return "\n".join(["Notes", *lines]) if lines else ""
