"""Whether keyed noise is normal and independent: `python -m benchmarks.noise_statistics`.

One table: moments of fp32 and bf16 noise, Kolmogorov and Smirnov's distance, chi-square over
equiprobable bins, correlations within a sample and between neighbouring samples, steps, streams
and seeds, of values and of squares. Every line has the probability that true normals do no
better. Exit status 1 if one of them lies below 0.001 over the number of lines (Bonferroni): true
normals fail once in a thousand keys. All sums are streamed; 10^8 draws take some 200 MiB.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .report import aligned

BATCH, ELEMENTS = 64, 2**14
DRAWS = 10**8
BINS, COARSE_BINS = 2**16, 2**10
LAGS = (*range(1, 9), 16, 64, 1024)
FAILURE = 1e-3
# E x^p of a standard normal, and the variance of x^p.
MOMENTS = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}

# (seed, sample_ids, step, stream, dtype) -> [BATCH, ELEMENTS]
Draw = Callable[[int, Tensor, int, int, torch.dtype], Tensor]


def keyed(seed: int, sample_ids: Tensor, step: int, stream: int, dtype: torch.dtype) -> Tensor:
    from vqkernels import normal_noise

    shape = (BATCH, ELEMENTS)
    return normal_noise(
        shape, seed=seed, sample_ids=sample_ids, step=step, stream=stream, dtype=dtype
    )


@dataclass(frozen=True)
class Line:
    """`score` is in standard deviations where there is one; `p` the chance of a worse one."""

    statistic: str
    draws: int
    value: float
    score: float | None
    p: float


class Statistics:
    """Sums over all draws; a hundred million of them fit the digits of float64."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.sums: dict[str, float] = defaultdict(float)
        self.histogram = torch.zeros(BINS, dtype=torch.int64)

    def add_values(self, x: Tensor) -> None:
        """A chunk `[B, E]` of float64: moments, bins of equal probability, correlations inside."""
        self.add_moments("fp32", x)
        places = (torch.special.ndtr(x) * BINS).long().clamp_(max=BINS - 1)
        self.histogram += places.flatten().bincount(minlength=BINS)
        for lag in LAGS:
            self.add_pairs(f"elements {lag} apart", x[:, :-lag], x[:, lag:])
        self.add_pairs("neighbouring samples", x[:-1], x[1:])

    def add_moments(self, what: str, x: Tensor) -> None:
        power = torch.ones_like(x)
        for p in MOMENTS:
            power *= x
            self._add(f"{what}: E x^{p}", power)

    def add_pairs(self, what: str, x: Tensor, y: Tensor) -> None:
        """Sums whose terms have mean 0 and variance 1 if x and y are independent normals."""
        self._add(f"{what}: values", x * y)
        self._add(f"{what}: squares", (x.square() - 1).mul_(y.square() - 1).div_(2))

    def _add(self, name: str, terms: Tensor) -> None:
        self.sums[name] += float(terms.sum())
        self.counts[name] += terms.numel()

    def lines(self) -> Iterator[Line]:
        for name, total in self.sums.items():
            count, mean, variance = self.counts[name], 0.0, 1.0
            if ": E x^" in name:
                mean, variance = MOMENTS[int(name[-1])]
            score = (total / count - mean) / math.sqrt(variance / count)
            yield Line(name, count, total / count, score, math.erfc(abs(score) / math.sqrt(2)))
        yield self._kolmogorov_smirnov()
        yield self._chi_square()

    def _kolmogorov_smirnov(self) -> Line:
        """The distance at the bins' edges: never more than the supremum, by a hair less."""
        count = int(self.histogram.sum())
        edges = torch.arange(1, BINS + 1, dtype=torch.float64) / BINS
        distance = float((self.histogram.cumsum(0) / count - edges).abs().max())
        t = math.sqrt(count) * distance
        terms = ((-1) ** (k - 1) * math.exp(-2 * (k * t) ** 2) for k in range(1, 200))
        p = 2 * sum(terms) if t > 0.2 else 1.0  # 1 - 5e-13 there
        return Line("Kolmogorov-Smirnov distance", count, distance, None, min(1.0, p))

    def _chi_square(self) -> Line:
        found = self.histogram.view(COARSE_BINS, -1).sum(1).double()
        expected = found.sum() / COARSE_BINS
        value, freedom = (found - expected).square().sum() / expected, COARSE_BINS - 1
        p = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), value / 2)
        name = f"chi-square, {freedom} degrees of freedom"
        return Line(name, int(found.sum()), float(value), None, float(p))


def measure(draws: int, seed: int, draw: Draw = keyed) -> list[Line]:
    statistics = Statistics()
    chunks = max(1, round(draws / (BATCH * ELEMENTS)))
    for chunk in with_progress(range(chunks)):
        ids = torch.arange(chunk * BATCH, (chunk + 1) * BATCH)
        x = draw(seed, ids, 0, 0, torch.float32).double()
        statistics.add_values(x)
        neighbours = {
            "neighbouring steps": (seed, ids, 1, 0),
            "neighbouring streams": (seed, ids, 0, 1),
            "neighbouring seeds": (seed + 1, ids, 0, 0),
            "seeds 2^32 apart": (seed + 2**32, ids, 0, 0),
        }
        for name, key in neighbours.items():
            statistics.add_pairs(name, x, draw(*key, torch.float32).double())
        statistics.add_moments("bf16", draw(seed, ids, 0, 0, torch.bfloat16).double())
    return list(statistics.lines())


def suspects(lines: list[Line]) -> list[Line]:
    return [line for line in lines if not line.p >= FAILURE / len(lines)]


def with_progress(chunks: Iterable[int]) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError:
        return chunks
    bar: Any = tqdm(chunks, unit="chunk", dynamic_ncols=True)
    return bar


def render(lines: list[Line]) -> str:
    rows = [["statistic", "draws", "value", "deviations", "p"]]
    for line in lines:
        score = "" if line.score is None else f"{line.score:+.2f}"
        rows.append(
            [line.statistic, f"{line.draws:.3g}", f"{line.value:+.3e}", score, f"{line.p:.3g}"]
        )
    return "\n".join(aligned(rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.noise_statistics", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--draws", type=float, default=DRAWS, help=f"default {DRAWS:.0e}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not options.draws >= 1:
        parser.error(f"--draws must be at least 1, got {options.draws:g}")
    lines = measure(int(options.draws), options.seed)
    print(render(lines))
    found = suspects(lines)
    limit = f"{FAILURE:g} / {len(lines)} = {FAILURE / len(lines):.1e}"
    if found:
        print(f"\nbelow {limit}: {', '.join(line.statistic for line in found)}")
        return 1
    print(f"\nno p below {limit}; the least is {min(line.p for line in lines):.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
