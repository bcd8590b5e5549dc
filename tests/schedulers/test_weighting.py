"""Loss weights against their papers' formulas, and times against diffusers and their densities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, training_utils
from torch import Tensor

from vqkernels.schedulers.conversions import Level, convert_prediction
from vqkernels.schedulers.weighting import (
    edm_weight,
    min_snr_weight,
    p2_weight,
    sample_times,
    sd3_weight,
    soft_min_snr_weight,
)

TARGETS = ("epsilon", "sample", "v", "flow")
WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "min_snr": min_snr_weight,
    "soft_min_snr": soft_min_snr_weight,
    "p2": p2_weight,
    "edm": edm_weight,
}
# On the data's error, from the ratio of the weights.
FORMULAS: dict[str, Callable[[float], float]] = {
    "min_snr": lambda snr: min(snr, 5),
    "soft_min_snr": lambda snr: 1 / (1 / snr + 1 / 4),
    "p2": lambda snr: snr / (1 + snr),
    "edm": lambda snr: (1 / snr + 0.25) / (0.25 / snr),
}
PATHS = {
    "ddpm": lambda t: (math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)),
    "edm": lambda t: (1.0, t * 80),
    "flow": lambda t: (1 - t, t),
}


def levels(path: str, count: int = 97) -> Level:
    pairs = [PATHS[path](i / (count + 1)) for i in range(1, count + 1)]
    return Level(*torch.tensor(pairs, dtype=torch.float64).unbind(1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_target_is_one_loss(name: str, path: str) -> None:
    """The weighted error of one wrong prediction is the same in whatever it is written."""
    level = levels(path)
    x_t, right = torch.randn(2, 97, 6, dtype=torch.float64)
    wrong = right + torch.randn(97, 6, dtype=torch.float64)
    ratio = level.alpha / level.sigma
    formula = torch.tensor([FORMULAS[name](float(r) ** 2) for r in ratio], dtype=torch.float64)
    expected = formula * (wrong - right).square().sum(1)
    for target in TARGETS:
        said = [
            convert_prediction(data, x_t, level, source="sample", target=target)
            for data in (wrong, right)
        ]
        weight = WEIGHTS[name](level.alpha, level.sigma, target=target)
        assert weight.dtype == torch.float32
        error = weight * (said[0] - said[1]).square().sum(1)
        assert ((error - expected).abs() <= 2e-7 * expected).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_edges(name: str) -> None:
    """No data at all, and no noise at all: a number, or the infinity of the formula; no NaN."""
    alpha, sigma = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    for target in TARGETS:
        weight = WEIGHTS[name](alpha, sigma, target=target)
        assert not weight.isnan().any()
        infinite = {("edm", "epsilon"): [True, False], ("edm", "sample"): [False, True]}
        assert weight.isinf().tolist() == infinite.get((name, target), [False, False])


def test_min_snr_is_that_of_training_scripts() -> None:
    scheduler = DDPMScheduler()
    t = torch.arange(1000)
    snr = training_utils.compute_snr(scheduler, t)
    squares = scheduler.alphas_cumprod
    alpha, sigma = squares.sqrt(), (1 - squares).sqrt()
    clipped = snr.clamp(max=5)
    for target, divisor in (("epsilon", snr), ("v", snr + 1)):
        weight = min_snr_weight(alpha, sigma, target=target)
        assert ((weight - clipped / divisor).abs() <= 1e-6 * weight).all()


def test_weights_keep_the_shape_of_levels() -> None:
    alpha = torch.rand(2, 3, 5)
    for weight in WEIGHTS.values():
        assert weight(alpha, 1 - alpha).shape == (2, 3, 5)
        assert weight(alpha[:0], alpha[:0]).shape == (0, 3, 5)
    assert p2_weight(alpha, 1 - alpha, gamma=0).eq(1).all()


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none"])
def test_sd3_weights_of_diffusers(scheme: str) -> None:
    sigma = torch.linspace(0.001, 1, 333)
    theirs = training_utils.compute_loss_weighting_for_sd3(scheme, sigma)
    assert ((sd3_weight(sigma, scheme=scheme) - theirs).abs() <= 1e-6 * theirs).all()


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_times_of_diffusers(density: str) -> None:
    """The same generator gives the same times, bit for bit."""
    theirs = training_utils.compute_density_for_timestep_sampling(
        density, 1000, 0.3, 1.2, 0.8, generator=torch.Generator().manual_seed(5)
    )
    ours = sample_times(
        1000,
        density=density,
        logit_mean=0.3,
        logit_std=1.2,
        mode_scale=0.8,
        generator=torch.Generator().manual_seed(5),
    )
    assert torch.equal(ours, theirs)


def distribution(density: str, t: Tensor) -> Tensor:
    """The distribution function, from its definition."""
    if density == "uniform":
        return t
    if density == "logit_normal":
        return torch.special.ndtr((t.logit() - 0.3) / 1.2)
    # f(u) falls from 1 to 0: P(f(u) <= t) = 1 - u where f(u) = t, found by bisection.
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        u = (low + high) / 2
        value = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        low, high = torch.where(value > t, u, low), torch.where(value > t, high, u)
    return 1 - low


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_keyed_times_have_their_density(density: str) -> None:
    n = 20_000
    t = sample_times(n, density=density, logit_mean=0.3, logit_std=1.2, seed=3)
    assert t.dtype == torch.float32
    assert (t >= 0).all()
    assert (t <= 1).all()
    ordered = distribution(density, t.double().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov, 1 in 1000


def test_keyed_times_belong_to_samples() -> None:
    whole = sample_times(10, seed=7, step=4)
    ids = torch.tensor([8, 2])
    assert torch.equal(sample_times(2, seed=7, step=4, sample_ids=ids), whole[ids])
    assert not torch.equal(sample_times(10, seed=7, step=5), whole)
    assert not torch.equal(sample_times(10, seed=7, step=4, stream=0), whole)
    assert sample_times(0, seed=7).shape == (0,)


def test_bad_arguments() -> None:
    level = torch.rand(3)
    with pytest.raises(ValueError, match=r"gamma must be positive and finite, got 0"):
        min_snr_weight(level, level, gamma=0)
    with pytest.raises(ValueError, match=r"gamma must be a finite number of at least 0, got -1"):
        p2_weight(level, level, gamma=-1)
    with pytest.raises(ValueError, match=r"one shape, got \[3\] and \[2\]"):
        edm_weight(level, level[:2])
    with pytest.raises(TypeError, match=r"sigma must be float32.*got torch.int64"):
        soft_min_snr_weight(level, torch.arange(3))
    with pytest.raises(ValueError, match=r"target must be one of .*got 'noise'"):
        min_snr_weight(level, level, target="noise")
    with pytest.raises(ValueError, match=r"scheme must be one of .*got 'cos'"):
        sd3_weight(level, scheme="cos")
    with pytest.raises(ValueError, match=r"density must be one of .*got 'normal'"):
        sample_times(3, density="normal")
    with pytest.raises(ValueError, match=r"mode_scale must lie in .*got 2"):
        sample_times(3, density="mode", mode_scale=2)
    with pytest.raises(ValueError, match=r"give generator or seed, got both"):
        sample_times(3, seed=1, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"sample_ids goes with seed"):
        sample_times(3, sample_ids=torch.arange(3))
    with pytest.raises(ValueError, match=r"logit_std must be positive"):
        sample_times(3, logit_std=0)
    with pytest.raises(ValueError, match=r"batch_size must be at least 0, got -1"):
        sample_times(-1)
