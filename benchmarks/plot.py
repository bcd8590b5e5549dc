"""One picture of a results CSV: `python -m benchmarks.plot results.csv [picture.png]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .case import OURS
from .records import Record, grouped, ratio, read_csv

# Okabe and Ito's palette, distinguishable with colour-blindness; each peer has a marker as well.
STYLES = {
    "cdist": ("#0072B2", "o"),
    "matmul": ("#009E73", "s"),
    "faiss": ("#D55E00", "D"),
    "vector-quantize-pytorch": ("#CC79A7", "^"),
    "diffusers": ("#56B4E9", "P"),
}
OTHER_STYLE = ("#555555", "v")
SPREAD = 0.2


def plot(records: Sequence[Record], path: Path) -> None:
    """Draws our time over each peer's, a line a row, on a log axis; left of 1 we are faster.

    Filled marks are the fewest threads measured, hollow ones the most.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [r for r in records if r.op != "ceiling"]
    threads = sorted({r.threads for r in cases})
    labels = list(dict.fromkeys(_label(r) for r in reversed(cases)))
    disturbed = {_label(r) for r in cases if r.busy}
    peers = list(dict.fromkeys(r.provider for r in cases if r.provider != OURS))
    heights = {label: height for height, label in enumerate(labels)}

    figure, axes = plt.subplots(figsize=(10, 1.8 + 0.42 * len(labels)), layout="constrained")
    for row in grouped(cases).values():
        ratios = [(peer, ratio(row, OURS, peer)) for peer in peers]
        present = [(peer, value) for peer, value in ratios if value is not None]
        for place, (peer, value) in enumerate(present):
            colour, marker = STYLES.get(peer, OTHER_STYLE)
            axes.plot(
                value,
                heights[_label(row[0])] + SPREAD * (0.5 * (len(present) - 1) - place),
                marker=marker,
                markersize=6.5,
                markeredgecolor=colour,
                markerfacecolor=colour if row[0].threads == threads[0] else "white",
                linestyle="none",
                zorder=3,
            )
    axes.axvline(1.0, color="#333333", linewidth=1.2, zorder=2)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 1.3))
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    shown = [f"{label} *" if label in disturbed else label for label in labels]
    axes.set_yticks(range(len(labels)), shown, fontsize=8.5)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    for height in range(0, len(labels), 2):
        axes.axhspan(height - 0.5, height + 0.5, color="#f2f2f2", zorder=0)
    axes.grid(axis="x", color="#cccccc", linewidth=0.6, zorder=1)
    footnote = "\n* other processes were busy during this row" if disturbed else ""
    axes.set_xlabel(
        f"time of vqkernels / time of the peer (left of 1x: vqkernels is faster){footnote}"
    )
    if cases:
        axes.set_title(f"{cases[0].device}\n{cases[0].versions}", fontsize=8.5, loc="left")
    _legend(axes, peers, threads)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label(record: Record) -> str:
    op = "" if record.op == "nearest_code" else f"{record.op}: "
    mode = "" if record.mode in ("packing included", "training step") else f", {record.mode}"
    return f"{op}{record.name} {record.shape}{mode}"


def _legend(axes: object, peers: Sequence[str], threads: Sequence[int]) -> None:
    from matplotlib.lines import Line2D

    def mark(label: str, colour: str, marker: str, filled: bool) -> Line2D:
        face = colour if filled else "white"
        return Line2D(
            [], [], label=label, marker=marker, ls="none", mec=colour, mfc=face, markersize=6.5
        )

    marks = [mark(peer, *STYLES.get(peer, OTHER_STYLE), True) for peer in peers]
    for count in threads:
        word = f"{count} thread{'s' if count > 1 else ''}"
        marks.append(mark(word, "#333333", "o", count == threads[0]))
    axes.figure.legend(  # type: ignore[attr-defined]
        handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=9
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path, nargs="?", help="default: beside the CSV")
    options = parser.parse_args()
    picture = options.png or options.csv.with_suffix(".png")
    plot(read_csv(options.csv), picture)
    print(picture)


if __name__ == "__main__":
    main()
