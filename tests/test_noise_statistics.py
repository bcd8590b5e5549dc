"""The statistics of keyed noise at a quarter of a million draws, and that they find bad noise."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import noise_statistics as statistics

ELEMENTS = 2**11
DRAWS = 2 * statistics.BATCH * ELEMENTS


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "ELEMENTS", ELEMENTS)


def test_keyed_noise_passes(capsys: pytest.CaptureFixture) -> None:
    assert statistics.main(["--draws", str(DRAWS), "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line]
    # Two of four moments, eleven lags, samples, steps, streams and two pairs of seeds.
    assert len(lines) == 1 + 2 * 4 + 2 * (11 + 5) + 2 + 1
    assert "no p below 0.001 / 42" in lines[-1]


def keyed(*key: object) -> Tensor:
    return statistics.keyed(*key)  # type: ignore[arg-type]


def wide(*key: object) -> Tensor:
    return 1.05 * keyed(*key)


def uniform_sum(seed: int, ids: Tensor, step: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Twelve uniforms: the first three moments are right."""
    generator = torch.Generator().manual_seed(hash((seed, int(ids[0]), step, stream)) % 2**63)
    shape = (statistics.BATCH, statistics.ELEMENTS, 12)
    return (torch.rand(shape, generator=generator).sum(-1) - 6).to(dtype)


def one_stream(seed: int, ids: Tensor, step: int, stream: int, dtype: torch.dtype) -> Tensor:
    return keyed(seed, ids, step, 0, dtype)


def opposite_step(seed: int, ids: Tensor, step: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Values are not correlated, squares are."""
    z = keyed(seed, ids, 0, stream, dtype)
    flip = 1 - 2 * (torch.arange(z.shape[1]) % 2)
    return z * flip.to(dtype) if step else z


def low_seed(seed: int, ids: Tensor, step: int, stream: int, dtype: torch.dtype) -> Tensor:
    return keyed(seed % 2**32, ids, step, stream, dtype)


def repeating(*key: object) -> Tensor:
    return keyed(*key)[:, : statistics.ELEMENTS // 4].repeat_interleave(4, 1)


def coarse(*key: object) -> Tensor:
    """Rounded to eighths: its bins are uneven, its moments nearly right."""
    return (keyed(*key).float() * 8).round().div(8)


@pytest.mark.parametrize(
    ("draw", "where"),
    [
        (wide, "fp32: E x^2"),
        (uniform_sum, "fp32: E x^4"),
        (wide, "Kolmogorov-Smirnov distance"),
        (one_stream, "neighbouring streams: values"),
        (opposite_step, "neighbouring steps: squares"),
        (low_seed, "seeds 2^32 apart: values"),
        (repeating, "elements 3 apart: values"),
        (coarse, "chi-square, 1023 degrees of freedom"),
    ],
)
def test_bad_noise_is_found(draw: statistics.Draw, where: str) -> None:
    lines = statistics.measure(DRAWS, 5, draw)
    assert where in [line.statistic for line in statistics.suspects(lines)]


def test_wrong_counts_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        statistics.main(["--draws", "0"])
    assert "--draws must be at least 1, got 0" in capsys.readouterr().err
