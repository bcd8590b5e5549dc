"""Conversions: round trips, and the definitions of each convention."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from vqkernels import diffuse
from vqkernels.schedulers.conversions import (
    PARAMETERISATIONS,
    DataTime,
    DDPMIndex,
    EDMSigma,
    Level,
    NoiseTime,
    convert_prediction,
    rescale,
)

SQUARES = DDPMScheduler().alphas_cumprod.double()
COSINE = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()


def data_noise(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def random_levels(*shape: int) -> Level:
    """Ratios over 6 decades, at scales that no convention has."""
    ratio = torch.exp(torch.empty(shape, dtype=torch.float64).uniform_(-7, 7))
    scale = torch.exp(torch.empty(shape, dtype=torch.float64).uniform_(-2, 2))
    return Level(scale, scale * ratio)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PARAMETERISATIONS, repeat=2)))
def test_parameterisations(source: str, target: str) -> None:
    x0, z = data_noise(64, 3, 5)
    level = random_levels(64)
    alpha, sigma = (weight[:, None, None] for weight in level)
    values = {
        "epsilon": z,
        "sample": x0,
        "v": alpha * z - sigma * x0,
        "flow": z - x0,
        "data_flow": x0 - z,
    }
    x_t = alpha * x0 + sigma * z
    there = convert_prediction(values[source], x_t, level, source=source, target=target)
    size = 1 + (sigma / alpha) + (alpha / sigma)  # how ill-conditioned a level makes the worst pair
    assert ((there - values[target]).abs() <= 1e-14 * size**2 * (1 + alpha + sigma)).all()
    back = convert_prediction(there, x_t, level, source=target, target=source)
    assert ((back - values[source]).abs() <= 1e-14 * size**3 * (1 + alpha + sigma)).all()


@pytest.mark.parametrize("target", ["epsilon", "sample", "v", "flow"])
def test_names_are_those_of_diffuse(target: str) -> None:
    x0, z = (tensor.float() for tensor in data_noise(4, 6))
    level = NoiseTime(torch.tensor([0.1, 0.4, 0.7, 0.9])).level()
    x_t, expected = diffuse(x0, level.alpha, level.sigma, noise=z, target=target)
    said = convert_prediction(z, x_t, level, source="epsilon", target=target)
    assert said.dtype == torch.float32
    assert (said - expected).abs().max() <= 4e-6


def test_per_token_levels_and_dtypes() -> None:
    x0, z = data_noise(2, 3, 4)
    t = torch.rand(2, 3, dtype=torch.float64)
    level = NoiseTime(t).level()
    x_t = (1 - t)[..., None] * x0 + t[..., None] * z
    said = convert_prediction(z - x0, x_t, level, source="flow", target="sample")
    assert (said - x0).abs().max() <= 1e-14
    half = convert_prediction(
        (z - x0).bfloat16(), x_t.bfloat16(), level, source="flow", target="sample"
    )
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("squares", [SQUARES, COSINE])
def test_times_round_trip(squares: Tensor) -> None:
    """From each convention to the others and back: the same number."""
    t = torch.cat([torch.rand(200, dtype=torch.float64) * 999, torch.arange(0.0, 1000, 37)])
    level = DDPMIndex(t, squares).level()
    assert (level.alpha**2 + level.sigma**2 - 1).abs().max() <= 1e-15
    for way in (EDMSigma, NoiseTime, DataTime):
        there = way.at(level)
        back = DDPMIndex.at(there.level(), squares)
        assert (back.t - t).abs().max() <= 1e-8
        for other in (EDMSigma, NoiseTime, DataTime):
            again = way.at(other.at(there.level()).level())
            (value,), (expected,) = vars(again).values(), vars(there).values()
            assert ((value - expected).abs() <= 1e-12 * expected).all()


def test_what_the_names_say() -> None:
    t = torch.tensor([0.25])
    assert torch.allclose(DataTime.at(NoiseTime(t).level()).t, 1 - t.double())
    assert torch.allclose(EDMSigma.at(NoiseTime(t).level()).sigma, torch.tensor(1 / 3).double())
    assert torch.allclose(NoiseTime.at(EDMSigma(torch.tensor([1.0])).level()).t, t.double() * 2)
    # Noise lies at the end of a DDPM index and of a noise time, at the start of a data time.
    ends = DDPMIndex(torch.tensor([0, 999]), SQUARES).level()
    assert NoiseTime.at(ends).t.tolist() == pytest.approx([0.0099, 0.9937], abs=1e-3)
    assert DataTime.at(ends).t.tolist() == pytest.approx([0.9901, 0.0063], abs=1e-3)


def test_index_entries_and_between() -> None:
    level = DDPMIndex(torch.arange(1000), SQUARES).level()
    assert (level.alpha**2 - SQUARES).abs().max() <= 1e-15
    half = DDPMIndex(torch.tensor([410.5]), SQUARES).level()
    ratios = ((1 - SQUARES) / SQUARES).sqrt()
    assert float(half.sigma / half.alpha) == pytest.approx(math.sqrt(ratios[410] * ratios[411]))


def test_ends() -> None:
    """No data at all, and no noise at all."""
    squares = torch.cat([SQUARES[:-1], torch.zeros(1, dtype=torch.float64)])
    last = DDPMIndex(torch.tensor([998.0, 999.0]), squares).level()
    assert last.alpha[1] == 0
    assert last.sigma[1] == 1
    assert NoiseTime.at(last).t[1] == 1
    assert DDPMIndex.at(last, squares).t.tolist() == pytest.approx([998, 999], abs=1e-8)
    clean = NoiseTime(torch.tensor([0.0])).level()
    assert DDPMIndex.at(clean, squares).t == 0
    assert EDMSigma.at(clean).sigma == 0
    assert EDMSigma.at(NoiseTime(torch.tensor([1.0])).level()).sigma == math.inf


def test_rescale() -> None:
    x0, z = data_noise(5, 4)
    level = DDPMIndex(torch.tensor([0, 10, 500, 900, 999]), SQUARES).level()
    x_t = level.alpha[:, None] * x0 + level.sigma[:, None] * z
    for way in (EDMSigma, NoiseTime, DataTime):
        other = way.at(level).level()
        expected = other.alpha[:, None] * x0 + other.sigma[:, None] * z
        assert ((rescale(x_t, level, other) - expected).abs() <= 1e-12 * expected.abs()).all()
        assert (rescale(rescale(x_t, level, other), other, level) - x_t).abs().max() <= 1e-14


def test_bad_arguments() -> None:
    x = torch.rand(2, 3)
    level = NoiseTime(torch.rand(2)).level()
    with pytest.raises(ValueError, match=r"source must be one of .*got 'velocity'"):
        convert_prediction(x, x, level, source="velocity", target="sample")
    with pytest.raises(ValueError, match=r"prediction must have x_t's shape \[2, 3\], got \[2\]"):
        convert_prediction(x[:, 0], x, level, source="v", target="sample")
    with pytest.raises(ValueError, match=r"prefix of x_t's shape \[2, 3\], got \[3\]"):
        convert_prediction(x, x, NoiseTime(torch.rand(3)).level(), source="v", target="sample")
    with pytest.raises(TypeError, match=r"x_t must be float32.*got torch.int64"):
        rescale(torch.arange(2), level, level)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 999\], got values from -1"):
        DDPMIndex(torch.tensor([-1.0, 3.0]), SQUARES).level()
    with pytest.raises(ValueError, match=r"alphas_cumprod must be \[T\] with T >= 2"):
        DDPMIndex(torch.tensor([0.0]), SQUARES[:1]).level()
