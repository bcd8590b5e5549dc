"""`diffusion_loss`, forward and backward, against its equation in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels import diffuse, diffusion_loss, normal_noise

every_capability = pytest.mark.every_capability
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
TARGETS = ["epsilon", "sample", "v", "flow"]
LOSSES = ["mse", "huber", "pseudo_huber"]
SHAPES = [
    ((3,), (3,)),
    ((2, 5), (2,)),
    ((3, 4, 7), (3,)),
    ((2, 33_000), (2,)),
    ((2, 6, 10), (2, 6)),
]


def by_element(level: Tensor, x: Tensor) -> Tensor:
    return level.double().reshape(level.shape + (1,) * (x.dim() - level.dim()))


def plain(
    output: Tensor,
    x: Tensor,
    z: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    weight: Tensor,
    delta: Tensor,
    target: str,
    loss: str,
) -> Tensor:
    a, s, d = (by_element(level, x) for level in (alpha, sigma, delta))
    wanted = {"epsilon": z, "sample": x, "v": a * z - s * x, "flow": z - x}[target]
    difference = output - wanted
    if loss == "mse":
        each = difference**2
    elif loss == "huber":
        each = torch.where(difference.abs() < d, difference**2 / 2, d * (difference.abs() - d / 2))
    else:
        each = 2 * d * ((difference**2 + d**2).sqrt() - d)
    inner = tuple(range(alpha.dim(), x.dim()))
    return (each.mean(inner) if inner else each) * weight.double()


@every_capability
@pytest.mark.parametrize(("output_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize(("shape", "levels"), SHAPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("target", TARGETS)
def test_against_float64(
    backend: str,
    target: str,
    loss: str,
    shape: tuple[int, ...],
    levels: tuple[int, ...],
    output_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    output = torch.randn(shape).to(output_dtype).requires_grad_()
    alpha, sigma, weight, delta = (torch.rand(levels) + 0.1 for _ in range(4))
    found = diffusion_loss(
        output,
        x,
        alpha,
        sigma,
        seed=3,
        step=2,
        target=target,
        weight=weight,
        loss=loss,
        delta=None if loss == "mse" else delta,
    )
    assert found.dtype == torch.float32
    assert found.shape == alpha.shape
    upstream = torch.randn(found.shape)
    grads = torch.autograd.grad(found, (output, x), upstream)

    z = normal_noise(shape, seed=3, step=2).double()
    wide = [t.detach().double().requires_grad_() for t in (output, x)]
    expected = plain(*wide, z, alpha, sigma, weight, delta, target, loss)
    assert ((found - expected).abs() <= 4e-6 * expected.abs().max()).all()
    exact = torch.autograd.grad((expected * upstream).sum() + 0 * wide[1].sum(), wide)
    for mine, true, given in zip(grads, exact, (output, x), strict=True):
        assert mine.dtype == given.dtype
        allowed = torch.finfo(mine.dtype).eps / 2 * true.abs() + 5e-6 * true.abs().max()
        allowed = allowed.clamp(min=torch.finfo(mine.dtype).smallest_normal * 2**-10)
        assert ((mine.double() - true).abs() <= allowed).all()


@every_capability
def test_the_target_is_that_of_diffuse(backend: str) -> None:
    x, alpha, sigma = torch.randn(4, 3, 9), torch.rand(4), torch.rand(4)
    output = torch.randn(4, 3, 9)
    for target in TARGETS:
        _, wanted = diffuse(x, alpha, sigma, seed=11, target=target)
        losses = diffusion_loss(output, x, alpha, sigma, seed=11, target=target)
        expected = F.mse_loss(output, wanted, reduction="none").flatten(1).mean(1)
        torch.testing.assert_close(losses, expected)
        z = normal_noise(x.shape, seed=11)
        given = diffusion_loss(output, x, alpha, sigma, noise=z, target=target)
        torch.testing.assert_close(losses, given)


def test_threads_do_not_matter(native_cpu: None, restored_threads: None) -> None:
    x, alpha, sigma = torch.randn(2, 300_000), torch.rand(2), torch.rand(2)
    output = torch.randn(2, 300_000, requires_grad=True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        losses = diffusion_loss(output, x, alpha, sigma, seed=1, target="v")
        results.append((losses, torch.autograd.grad(losses.sum(), output)[0]))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_samples_stand_alone(native_cpu: None) -> None:
    x, alpha, sigma = torch.randn(5, 33), torch.rand(5), torch.rand(5)
    output = torch.randn(5, 33)
    whole = diffusion_loss(output, x, alpha, sigma, seed=1)
    for i in range(5):
        one, ids = slice(i, i + 1), torch.tensor([i])
        alone = diffusion_loss(output[one], x[one], alpha[one], sigma[one], seed=1, sample_ids=ids)
        assert torch.equal(alone, whole[one])


def test_stores_no_noise(backend: str) -> None:
    """What is kept for the gradient is what was given, and a handful of numbers."""
    x, output = torch.randn(2, 5000), torch.randn(2, 5000, requires_grad=True)
    alpha, sigma = torch.rand(2), torch.rand(2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        diffusion_loss(output, x, alpha, sigma, seed=1).sum()
    given = {t.data_ptr() for t in (x, output)}
    assert all(t.data_ptr() in given or t.numel() <= 4 for t in kept)


@every_capability
def test_nan_reaches_its_loss_alone(backend: str) -> None:
    x, output = torch.randn(3, 50), torch.randn(3, 50)
    output[1, 7] = torch.nan
    for loss, delta in (("mse", None), ("huber", 0.3), ("pseudo_huber", 0.3)):
        losses = diffusion_loss(
            output, x, torch.rand(3), torch.rand(3), seed=1, loss=loss, delta=delta
        )
        assert losses.isnan().tolist() == [False, True, False]


def test_empty(backend: str) -> None:
    for shape in ((0, 4), (2, 0)):
        output = torch.randn(shape, requires_grad=True)
        level = torch.rand(shape[0])
        losses = diffusion_loss(output, torch.randn(shape), level, level, seed=1)
        assert losses.shape == level.shape
        losses.sum().backward()
        assert output.grad is not None
        assert output.grad.shape == shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model_output": torch.zeros(3, 2)}, ValueError, "model_output must have x0's shape"),
        ({"loss": "l1"}, ValueError, "loss must be one of 'mse', 'huber', 'pseudo_huber'"),
        ({"loss": "huber"}, ValueError, "delta goes with the Huber losses, got None"),
        ({"delta": 1.0}, ValueError, "delta goes with the Huber losses, got 1.0"),
        ({"loss": "huber", "delta": 0.0}, ValueError, "delta must be positive, got 0.0"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must be \[2\]"),
        (
            {"alpha": torch.ones(2, requires_grad=True)},
            ValueError,
            "alpha must not require a gradient",
        ),
        ({"seed": None}, ValueError, "give noise or seed, got neither"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    given: dict[str, object] = {
        "model_output": torch.zeros(2, 3),
        "x0": torch.zeros(2, 3),
        "alpha": torch.ones(2),
        "sigma": torch.ones(2),
        "seed": 1,
    }
    with pytest.raises(error, match=message):
        diffusion_loss(**{**given, **arguments})  # type: ignore[arg-type]


def test_second_derivative_raises(backend: str) -> None:
    output = torch.randn(2, 3, requires_grad=True)
    losses = diffusion_loss(output, torch.randn(2, 3), torch.rand(2), torch.rand(2), seed=1)
    (grad,) = torch.autograd.grad(losses.sum(), output, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_compiled_training_equals_eager() -> None:
    def train(weight: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor) -> Tensor:
        x_t, _ = diffuse(x, alpha, sigma, seed=seed)
        return diffusion_loss(x_t * weight, x, alpha, sigma, seed=seed).mean()

    compiled = torch.compile(train, fullgraph=True)
    weights = [torch.ones(9, requires_grad=True) for _ in range(2)]
    optimizers = [torch.optim.AdamW([weight], lr=0.1) for weight in weights]
    for step in range(10):
        batch = (torch.randn(4, 9), torch.rand(4), torch.rand(4), torch.tensor(step))
        for function, weight, optimizer in zip((compiled, train), weights, optimizers, strict=True):
            optimizer.zero_grad()
            function(weight, *batch).backward()
            optimizer.step()
    torch.testing.assert_close(*weights)
