"""The variational bound against numerical integration in float64 and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from vqkernels.schedulers.variational_bound import variational_bound

SQUARES = DDPMScheduler().alphas_cumprod.double()
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def inputs(timesteps: Tensor, elements: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (of epsilon), variance, x0 of 8-bit data, x_t: near each other, as a model's are."""
    shape = (len(timesteps), elements)
    x0 = torch.randint(0, 256, shape).double() / 127.5 - 1
    z = torch.randn(shape, dtype=torch.float64)
    kept = SQUARES[timesteps][:, None]
    x_t = kept.sqrt() * x0 + (1 - kept).sqrt() * z
    output = z + 0.1 * torch.randn(shape, dtype=torch.float64)
    return output, torch.empty(shape, dtype=torch.float64).uniform_(-1.2, 1.2), x0, x_t


def as_prediction(kind: str, epsilon: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
    kept = SQUARES[timesteps][:, None]
    data = (x_t - (1 - kept).sqrt() * epsilon) / kept.sqrt()
    v = kept.sqrt() * epsilon - (1 - kept).sqrt() * data
    return {"epsilon": epsilon, "sample": data, "v_prediction": v}[kind]


def gaussians(
    timestep: int, output: float, variance: float, x0: float, x_t: float
) -> tuple[float, float, float, float]:
    """Mean and standard deviation of the true and of the model's x_{t-1}, element by element."""
    kept = float(SQUARES[timestep])
    before = float(SQUARES[timestep - 1]) if timestep else 1.0
    alpha, beta = kept / before, 1 - kept / before
    noise_left = (1 - before) / (1 - kept)
    true_variance = beta * noise_left
    if timestep == 0:
        first, second = float(SQUARES[0]), float(SQUARES[1])
        true_variance = (1 - second / first) * (1 - first) / (1 - second)
    data = (x_t - math.sqrt(1 - kept) * output) / math.sqrt(kept)

    def mean(of: float) -> float:
        return math.sqrt(before) * beta / (1 - kept) * of + math.sqrt(alpha) * noise_left * x_t

    fraction = (variance + 1) / 2
    log = fraction * math.log(beta) + (1 - fraction) * math.log(true_variance)
    return mean(x0), math.sqrt(true_variance), mean(data), math.exp(log / 2)


def log_density(x: Tensor, mean: float, deviation: float) -> Tensor:
    return -0.5 * ((x - mean) / deviation) ** 2 - math.log(deviation * math.sqrt(2 * math.pi))


def integral(values: Tensor, width: float) -> float:
    """Simpson's rule over equidistant points."""
    weights = torch.full_like(values, 2)
    weights[1::2] = 4
    weights[0] = weights[-1] = 1
    return float((weights * values).sum()) * width / (3 * (len(values) - 1))


@pytest.mark.parametrize("timestep", [1, 2, 10, 500, 999])
def test_divergence_by_integration(timestep: int) -> None:
    timesteps = torch.tensor([timestep])
    output, variance, x0, x_t = inputs(timesteps)
    bound = variational_bound(output, variance, x0, x_t, timesteps, SQUARES)
    total = 0.0
    for element in zip(output[0], variance[0], x0[0], x_t[0], strict=True):
        mean, deviation, mean2, deviation2 = gaussians(timestep, *map(float, element))
        x = torch.linspace(-14, 14, 4001, dtype=torch.float64) * deviation + mean
        log_p, log_q = log_density(x, mean, deviation), log_density(x, mean2, deviation2)
        total += integral(log_p.exp() * (log_p - log_q), 28 * deviation)
    assert float(bound) == pytest.approx(total / 5 / math.log(2), rel=1e-9)


def test_decoder_by_integration() -> None:
    """Each bin's probability, the outermost ones reaching to infinity."""
    timesteps = torch.zeros(1, dtype=torch.int64)
    output, variance, x0, x_t = inputs(timesteps, 6)
    x0[0, 0], x0[0, 1] = -1, 1
    x_t[0, :2] = math.sqrt(float(SQUARES[0])) * x0[0, :2]
    bound = variational_bound(output, variance, x0, x_t, timesteps, SQUARES)
    total = 0.0
    for element in zip(output[0], variance[0], x0[0], x_t[0], strict=True):
        _, _, mean, deviation = gaussians(0, *map(float, element))
        centre = float(element[2])
        low = mean - 14 * deviation if centre == -1 else centre - 1 / 255
        high = mean + 14 * deviation if centre == 1 else centre + 1 / 255
        x = torch.linspace(low, high, 4001, dtype=torch.float64)
        total -= math.log(integral(log_density(x, mean, deviation).exp(), high - low))
    assert float(bound) == pytest.approx(total / 6 / math.log(2), rel=1e-9)


def test_decoder_bins_add_up() -> None:
    """Over all 256 values the probabilities sum to 1, for a wide and a narrow distribution."""
    grid = torch.arange(256, dtype=torch.float64)[:, None] / 127.5 - 1
    zeros = torch.zeros(256, dtype=torch.int64)
    for spread in (-3.0, 1.0, 30.0):
        bits = variational_bound(
            torch.full_like(grid, 0.13),
            torch.full_like(grid, spread),
            grid,
            grid,
            zeros,
            SQUARES,
            prediction_type="sample",
        )
        assert float((2**-bits).sum()) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_prediction_type_is_one_bound(kind: str) -> None:
    timesteps = torch.tensor([0, 1, 17, 500, 998])
    output, variance, x0, x_t = inputs(timesteps)
    expected = variational_bound(output, variance, x0, x_t, timesteps, SQUARES)
    said = as_prediction(kind, output, x_t, timesteps)
    bound = variational_bound(said, variance, x0, x_t, timesteps, SQUARES, prediction_type=kind)
    assert ((bound - expected).abs() <= 1e-9 * expected).all()


def test_a_perfect_model_has_no_divergence() -> None:
    timesteps = torch.tensor([1, 300, 999])
    _, variance, x0, x_t = inputs(timesteps)
    bound = variational_bound(
        x0, torch.full_like(variance, -1), x0, x_t, timesteps, SQUARES, prediction_type="sample"
    )
    assert bound.eq(0).all()


def test_samples_are_independent_and_fp32_is_close() -> None:
    timesteps = torch.tensor([0, 0, 1, 2, 50, 999])
    output, variance, x0, x_t = inputs(timesteps, 400)
    exact = variational_bound(output, variance, x0, x_t, timesteps, SQUARES)
    narrow = [tensor.float() for tensor in (output, variance, x0, x_t)]
    bound = variational_bound(*narrow, timesteps, SQUARES)
    assert bound.dtype == torch.float32
    assert ((bound - exact).abs() <= 2e-5 * exact).all()
    for i in range(6):
        rows = [tensor[i : i + 1] for tensor in (*narrow, timesteps)]
        assert torch.equal(variational_bound(*rows, SQUARES), bound[i : i + 1])


def test_gradient_reaches_the_variance_alone() -> None:
    timesteps = torch.tensor([0, 1, 700])
    output, variance, x0, x_t = inputs(timesteps)
    x0[0, 0], x0[0, 1] = -1, 1
    leaves = [tensor.clone().requires_grad_() for tensor in (output, x0, x_t)]
    free = variance.clone().requires_grad_()
    variational_bound(leaves[0], free, leaves[1], leaves[2], timesteps, SQUARES).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)
    assert free.grad is not None
    assert free.grad.isfinite().all()
    assert free.grad.ne(0).all()
    assert torch.autograd.gradcheck(
        lambda v: variational_bound(output, v, x0, x_t, timesteps, SQUARES), free
    )


def test_gradient_is_finite_far_from_the_data() -> None:
    """A decoder a thousand deviations off, and a variance far out of its range."""
    timesteps = torch.tensor([0, 0, 5])
    x0 = torch.tensor([[-1.0, 0.0, 1.0]]).expand(3, 3).contiguous()
    output = torch.tensor([[8.0, -8.0, -8.0], [0.0, 0.0, 0.0], [8.0, -8.0, -8.0]])
    variance = torch.tensor([[0.0], [9.0], [0.0]]).expand(3, 3).clone().requires_grad_()
    bound = variational_bound(
        output, variance, x0, x0, timesteps, SQUARES, prediction_type="sample"
    )
    bound.sum().backward()
    assert bound.isfinite().all()
    assert variance.grad is not None
    assert variance.grad.isfinite().all()


def test_bad_arguments() -> None:
    timesteps = torch.tensor([1, 2])
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"variance must have x0's shape \[2, 3\], got \[2, 6\]"):
        variational_bound(x, torch.rand(2, 6), x, x, timesteps, SQUARES)
    with pytest.raises(ValueError, match=r"timesteps must be int64 \[2\], got torch.float32 \[2\]"):
        variational_bound(x, x, x, x, timesteps.float(), SQUARES)
    with pytest.raises(ValueError, match=r"prediction_type must be one of .*got 'flow'"):
        variational_bound(x, x, x, x, timesteps, SQUARES, prediction_type="flow")
    with pytest.raises(TypeError, match=r"x0 must be float32.*got torch.int64"):
        variational_bound(x, x, x.long(), x, timesteps, SQUARES)
    with pytest.raises(ValueError, match=r"x0 must be \[B, ...\], got shape \[2\]"):
        variational_bound(x, x, x[:, 0], x, timesteps, SQUARES)
    with pytest.raises(ValueError, match=r"alphas_cumprod must be \[T\] with T >= 2"):
        variational_bound(x, x, x, x, timesteps, SQUARES[:1])
