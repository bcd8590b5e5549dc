"""`diffuse`, forward and backward, against its equation in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vqkernels import diffuse, normal_noise

every_capability = pytest.mark.every_capability
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x, z, a, s: z,
    "sample": lambda x, z, a, s: x,
    "v": lambda x, z, a, s: a * z - s * x,
    "flow": lambda x, z, a, s: z - x,
}
# The data's shape, and that of a noise level.
SHAPES = [
    ((3,), (3,)),
    ((2, 5), (2,)),
    ((3, 4, 6, 7), (3,)),
    ((2, 1500), (2,)),
    ((1, 2, 1025), ()),
    ((2, 6, 10), (2, 6)),
    ((2, 6, 10), (2, 6, 1)),
    ((2, 3, 4, 5), (2, 1, 4)),
    ((2, 3, 4), (2, 3, 4)),
    ((2, 3, 4), (1, 1, 4)),
    ((2, 700, 3), (2, 700)),
    ((0, 4), (0,)),
    ((4, 0), (4,)),
]


def by_element(level: Tensor, x: Tensor) -> Tensor:
    return level.double().reshape(level.shape + (1,) * (x.dim() - level.dim()))


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "levels"), SHAPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("drawn", [True, False])
def test_equation(
    backend: str,
    drawn: bool,
    target: str,
    shape: tuple[int, ...],
    levels: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    x = torch.randn(shape).to(dtype)
    alpha, sigma = torch.rand(levels), torch.rand(levels)
    ids = torch.randint(0, 2**40, shape[:1])
    z = normal_noise(shape, seed=7, sample_ids=ids, step=3, stream=2)
    if drawn:
        found = diffuse(x, alpha, sigma, seed=7, sample_ids=ids, step=3, stream=2, target=target)
    else:
        z = z.to(dtype)
        found = diffuse(x, alpha, sigma, noise=z, target=target)
    a, s = by_element(alpha, x), by_element(sigma, x)
    expected = TARGETS[target](x.double(), z.double(), a, s)
    for mine, true in zip(found, (a * x.double() + s * z.double(), expected), strict=True):
        assert mine.dtype == dtype
        assert mine.shape == x.shape
        rounding = torch.finfo(dtype).eps / 2 * true.abs() + 2e-6
        assert ((mine.double() - true).abs() <= rounding).all()


@every_capability
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("levels", [(2,), (2, 5), (2, 1, 4)])
def test_gradients(backend: str, target: str, levels: tuple[int, ...]) -> None:
    leaves = [torch.randn(2, 5, 4), torch.rand(levels), torch.rand(levels), torch.randn(2, 5, 4)]
    upstream = [torch.randn(2, 5, 4), torch.randn(2, 5, 4)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, alpha, sigma, z = leaves
    found = torch.autograd.grad(diffuse(x, alpha, sigma, noise=z, target=target), leaves, upstream)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    a, s = by_element(wide[1], x), by_element(wide[2], x)
    results = (a * wide[0] + s * wide[3], TARGETS[target](wide[0], wide[3], a, s))
    expected = torch.autograd.grad(results, wide, [g.double() for g in upstream], allow_unused=True)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


def test_gradients_draw_the_noise_again(backend: str) -> None:
    x = torch.randn(4, 2, 3, requires_grad=True)
    alpha, sigma = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
    ids = torch.tensor([7, 1, 3, 9])
    upstream = [torch.randn(4, 2, 3), torch.randn(4, 2, 3)]
    z = normal_noise(x.shape, seed=5, sample_ids=ids)
    drawn = diffuse(x, alpha, sigma, seed=5, sample_ids=ids, target="v")
    given = diffuse(x, alpha, sigma, noise=z, target="v")
    for mine, other in zip(drawn, given, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    leaves = (x, alpha, sigma)
    for mine, other in zip(
        torch.autograd.grad(drawn, leaves, upstream),
        torch.autograd.grad(given, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@every_capability
def test_strided_data(backend: str) -> None:
    x = torch.randn(3, 8, 5, 6)
    alpha, sigma = torch.rand(3), torch.rand(3)
    expected = diffuse(x, alpha, sigma, seed=1, target="v")
    for same in (
        x.to(memory_format=torch.channels_last),
        torch.cat([x, x], dim=1)[:, :8],
        torch.cat([x, x])[:3],
    ):
        for mine, other in zip(
            diffuse(same, alpha, sigma, seed=1, target="v"), expected, strict=True
        ):
            assert torch.equal(mine, other)


@every_capability
def test_samples_stand_alone(backend: str) -> None:
    x, alpha, sigma = torch.randn(5, 33), torch.rand(5), torch.rand(5)
    whole = diffuse(x, alpha, sigma, seed=1, target="flow")
    for i in range(5):
        one = slice(i, i + 1)
        alone = diffuse(
            x[one], alpha[one], sigma[one], seed=1, sample_ids=torch.tensor([i]), target="flow"
        )
        for mine, other in zip(alone, whole, strict=True):
            assert torch.equal(mine, other[one])


def test_large_results_go_past_the_caches(native_cpu: None) -> None:
    x = torch.randn(3, 3_000_001)
    alpha, sigma = torch.rand(3), torch.rand(3)
    z = normal_noise(x.shape, seed=1)
    x_t, wanted = diffuse(x, alpha, sigma, seed=1, target="v")
    a, s = alpha[:, None], sigma[:, None]
    torch.testing.assert_close(x_t, a * x + s * z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(wanted, a * z - s * x, rtol=1e-6, atol=1e-6)


@every_capability
def test_nan_and_infinity_stay_where_they_are(backend: str) -> None:
    x = torch.randn(2, 40)
    x[0, 3], x[1, 39] = torch.nan, torch.inf
    x_t, _ = diffuse(x, torch.ones(2), torch.ones(2), seed=1)
    assert x_t.isnan().nonzero().tolist() == [[0, 3]]
    assert x_t.isinf().nonzero().tolist() == [[1, 39]]


def test_out(backend: str) -> None:
    x, alpha, sigma = torch.randn(2, 40), torch.rand(2), torch.rand(2)
    out = (torch.empty(2, 40), torch.empty(2, 40))
    assert diffuse(x, alpha, sigma, seed=1, target="v", out=out) is out
    for mine, other in zip(out, diffuse(x, alpha, sigma, seed=1, target="v"), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(ValueError, match=r"out\[1\] must be a contiguous"):
        diffuse(x, alpha, sigma, seed=1, out=(out[0], torch.empty(40, 2).T))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x0": torch.zeros(2, 3).long()}, TypeError, "x0 must be float32"),
        ({"x0": torch.zeros(())}, ValueError, r"x0 must be \[B, ...\]"),
        ({"alpha": torch.zeros(4)}, ValueError, r"alpha must be \[2\], or the first dimensions"),
        ({"sigma": torch.zeros(2).long()}, TypeError, "sigma must be float32"),
        ({"target": "velocity"}, ValueError, "target must be one of 'epsilon'"),
        ({"noise": torch.zeros(2, 3)}, ValueError, "give noise or seed, got both"),
        ({"seed": None}, ValueError, "give noise or seed, got neither"),
        ({"seed": None, "noise": torch.zeros(3, 2)}, ValueError, "noise must have x0's shape"),
        (
            {"seed": None, "noise": torch.zeros(2, 3), "sample_ids": torch.zeros(2).long()},
            ValueError,
            "sample_ids goes with seed",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    given: dict[str, object] = {
        "x0": torch.zeros(2, 3),
        "alpha": torch.ones(2),
        "sigma": torch.ones(2),
        "seed": 1,
    }
    with pytest.raises(error, match=message):
        diffuse(**{**given, **arguments})  # type: ignore[arg-type]


def test_compiles() -> None:
    def train(x: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor) -> Tensor:
        x_t, target = diffuse(x, alpha, sigma, seed=seed, target="v")
        return (x_t * target).sum()

    compiled = torch.compile(train, fullgraph=True)
    x = torch.randn(3, 10, requires_grad=True)
    for step in range(10):
        alpha, sigma, seed = torch.rand(3), torch.rand(3), torch.tensor(step)
        loss, plain = compiled(x, alpha, sigma, seed), train(x, alpha, sigma, seed)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (loss, plain)))
