"""CUDA `normal_noise`, `diffuse` and `denoise_step`, the source that nvcc compiles, on the CPU."""

from __future__ import annotations

import math

import noise_calls
import pytest
import torch
from _helpers.data import generator
from cuda_calls import Case, CudaCalls, Device
from emulator import ORDERS, Emulator
from noise_cases import (
    KEY,
    TABLE,
    Draw,
    cases,
    check_diffuse,
    check_normals,
    check_quantile,
    check_step,
    rescaled,
)
from torch import Tensor

from vqkernels.ops.denoise_step import denoise_coefficients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_cases_in_every_order(kernels: Emulator, case: Case, order: str) -> None:
    kernels.set_order(order, seed=3)
    case.run(CudaCalls(kernels.library, kernels.declare, case.device))


def box_muller_exactly(words: Tensor) -> Tensor:
    """Float64, of the distance from 1 where the logarithm is near 0."""
    first, second = words[:, 0].double(), words[:, 1].double()
    near_one = torch.log1p((first + 1 - 2**32) * 2.0**-32)
    far = ((first + 1) * 2.0**-32).log()
    radius = (-2 * torch.where(first >= 2**31, near_one, far)).sqrt()
    angle = second * (2 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def test_box_muller_at_every_edge(plain: CudaCalls) -> None:
    """Powers of two, where the logarithm's exponent changes, where it turns to the distance from 1,
    and eighths of a turn: around each, on both words."""
    middle = [2**32 * eighth // 8 for eighth in range(9)]
    powers = [2**k for k in range(32)] + [int(2 ** (k + 0.5)) for k in range(32)]
    powers += [2**32 - power for power in powers]
    words = sorted({(at + by) % 2**32 for at in middle + powers for by in range(-3, 4)})
    pairs = torch.cartesian_prod(torch.tensor(words), torch.tensor(words))
    normals = noise_calls.box_muller(plain, pairs)
    assert (normals.double() - box_muller_exactly(pairs)).abs().max() < 1e-6


@pytest.mark.parametrize("most", [2**32, 2**12])
def test_box_muller_of_random_words(plain: CudaCalls, most: int) -> None:
    """The second time first words are small, and normals large."""
    words = torch.randint(0, 2**32, (500_000, 2), generator=generator(0))
    words[:, 0] %= most
    normals = noise_calls.box_muller(plain, words)
    assert (normals.double() - box_muller_exactly(words)).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (2, 7), (70, 3), (2, 8, 8), (3, 1030)])
def test_normals(plain: CudaCalls, shape: tuple[int, ...]) -> None:
    check_normals(plain, shape, None)
    check_normals(plain, shape, torch.randint(-(2**40), 2**40, shape[:1], generator=generator(0)))


@dtypes
@pytest.mark.parametrize("target", noise_calls.TARGETS)
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 5), (40, 2), (1, 1021), (2, 3, 24)])
def test_diffuse(plain: CudaCalls, shape: tuple[int, ...], target: str, dtype: torch.dtype) -> None:
    draw = Draw()
    x0 = draw(*shape, dtype=dtype)
    for dims in range(1, len(shape) + 1):
        alpha, sigma = draw.levels(*shape[:dims]), draw.levels(*shape[:dims])
        for noise in DTYPES:
            given = draw(*shape, dtype=noise)
            check_diffuse(plain, x0, alpha, sigma, given, None, None, target)
        check_diffuse(plain, x0, alpha, sigma, None, KEY, None, target)


def test_noise_is_the_samples_own(plain: CudaCalls) -> None:
    """The same bits alone, in a batch, at another place in it, and at single levels."""
    x0, ids = Draw()(4, 37), torch.tensor([7, -1, 2**31 + 3, 0])
    zero, one = torch.zeros(4), torch.ones(4)
    z, _ = noise_calls.diffuse(plain, x0, zero, one, None, KEY, ids)
    assert torch.equal(z, noise_calls.normal_noise(plain, (4, 37), KEY, ids))
    for i in range(4):
        alone = noise_calls.diffuse(plain, x0[:1], zero[:1], one[:1], None, KEY, ids[i : i + 1])
        assert torch.equal(alone[0][0], z[i])
    single = [level[:, None].repeat(1, 37) for level in (zero, one)]
    assert torch.equal(noise_calls.diffuse(plain, x0, *single, None, KEY, ids)[0], z)


@pytest.mark.parametrize("outputs", DTYPES)
@dtypes
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 5), (20, 3), (1, 1021)])
def test_denoise_step(
    plain: CudaCalls, shape: tuple[int, ...], dtype: torch.dtype, outputs: torch.dtype
) -> None:
    draw = Draw()
    sample, *history = (draw(*shape, dtype=dtype) for _ in range(5))
    output, uncond = draw(*shape, dtype=outputs), draw(*shape, dtype=outputs)
    variance = draw.levels(*shape).to(outputs)
    for row in (0, 1, 2):
        index = torch.full(shape[:1], row)
        for number, more in enumerate((
            {},
            {"threshold": "clip", "noise": draw(*shape, dtype=outputs)},
            {"variance": variance, "key": KEY},
            {"variance": variance, "variance_type": "learned", "key": KEY, "threshold": "clip"},
            {"uncond_output": uncond, "key": KEY},
            {"uncond_output": uncond, "threshold": "dynamic", "ratio": 0.8},
            {"threshold": "dynamic"},
        )):  # fmt: skip
            given = history[: number % 5]
            check_step(plain, sample, output, TABLE, index=index, history=given, **more)
            check_step(plain, sample, output, rescaled(), index=index, history=given, **more)


def test_rows_of_samples_and_tokens(plain: CudaCalls) -> None:
    """Rows behind the table's ends are its first and last, and the row is the noise's step."""
    draw = Draw()
    for shape, dims in (((4, 6, 16), 1), ((4, 6, 16), 2), ((4, 6, 3), 2), ((4, 6, 3), 3)):
        sample, output = draw(*shape), draw(*shape)
        index = torch.randint(-9, 9, shape[:dims], generator=generator(dims))
        index.view(-1)[0], index.view(-1)[1] = -(2**62), 2**62
        check_step(plain, sample, output, TABLE, index=index, key=KEY, history=[sample])


def test_guidance_at_one_is_the_conditions_output(plain: CudaCalls) -> None:
    draw = Draw()
    sample, output = draw(2, 33), draw(2, 33)
    uncond = torch.full_like(output, torch.nan)
    guided = noise_calls.denoise_step(plain, sample, output, TABLE, uncond_output=uncond)
    plainly = noise_calls.denoise_step(plain, sample, output, TABLE)
    assert torch.equal(guided[0], plainly[0])


def test_deviations_far_from_zero(plain: CudaCalls) -> None:
    """A mean far above the deviation, and a first element far from all others, cost no digits."""
    draw = Draw()
    for at in (300.0, -5000.0):
        output, uncond = draw(2, 3000) + at, draw(2, 3000) + at
        output[:, 0] += 4 * at
        check_step(plain, draw(2, 3000), output, rescaled(), index=torch.tensor(2),
                   uncond_output=uncond)  # fmt: skip


def test_one_element_is_not_rescaled(plain: CudaCalls) -> None:
    draw = Draw()
    for shape in ((3,), (3, 1)):
        index = torch.tensor(2)
        check_step(plain, draw(*shape), draw(*shape), rescaled(), index=index,
                   uncond_output=draw(*shape))  # fmt: skip


@dtypes
@pytest.mark.parametrize("elements", [1, 2, 3, 100, 4096, 5001])
def test_quantiles(plain: CudaCalls, elements: int, dtype: torch.dtype) -> None:
    """Normal, heavy-tailed, with many equal, tiny and subnormal magnitudes."""
    draw = Draw()
    x = 2 * draw(1, elements)
    kinds = (
        x,
        x.pow(5),
        x.round(),
        x * 1e-3,
        1.5 + x * 1e-6,
        x.sign() * 2,
        x * 1e-41,
        (x * 3e4).clamp(-6e4, 6e4),
    )
    for values in kinds:
        for ratio in (0.0, 0.25, 0.995, 1.0):
            check_quantile(plain, values, ratio, dtype)


def test_a_clip_below_one_limits_dynamic_thresholds(plain: CudaCalls) -> None:
    table = denoise_coefficients(prediction_output=1, prev_prediction=1, clip=0.4)
    x = Draw()(2, 50)
    check_step(plain, torch.zeros_like(x), x, table, threshold="dynamic")


def test_samples_far_apart(plain: CudaCalls) -> None:
    """The third sample lies 2^31 elements behind the first; few pages of it are touched."""
    stride, width = (1 << 30) + 8, 40
    memory = torch.empty(2 * stride + width, dtype=torch.bfloat16)
    draw = Draw()
    dense = [draw(3, width, dtype=torch.bfloat16) for _ in range(2)]
    far = memory.as_strided((3, width), (stride, 1)).copy_(dense[0])
    levels = draw.levels(3), draw.levels(3)
    for mine, other in zip(
        noise_calls.diffuse(plain, far, *levels, None, KEY),
        noise_calls.diffuse(plain, dense[0], *levels, None, KEY),
        strict=True,
    ):
        assert torch.equal(mine, other)
    for more in ({}, {"threshold": "dynamic"}):
        assert torch.equal(
            noise_calls.denoise_step(plain, dense[1], far, TABLE, torch.tensor(1), **more)[0],
            noise_calls.denoise_step(plain, dense[1], dense[0], TABLE, torch.tensor(1), **more)[0],
        )


def test_the_device_does_not_change_a_bit(kernels: Emulator) -> None:
    draw = Draw()
    sample, output, uncond = (draw(2, 6000) for _ in range(3))
    results = []
    for count, order in ((1, "forward"), (132, "shuffled")):
        kernels.set_order(order, seed=count)
        calls = CudaCalls(kernels.library, kernels.declare, Device(multiprocessors=count))
        for threshold in ("none", "dynamic"):
            index = torch.tensor([1, 2])
            results += noise_calls.denoise_step(
                calls, sample, output, rescaled(), index, uncond, threshold=threshold,
                want_prediction=True, want_extra=True, key=KEY,
            )  # fmt: skip
    assert all(map(torch.equal, results[:6], results[6:]))


def test_empty(plain: CudaCalls) -> None:
    for shape in ((0, 5), (3, 0)):
        x = torch.ones(shape)
        levels = torch.ones(shape[0])
        assert noise_calls.diffuse(plain, x, levels, levels, x)[0].shape == shape
        for more in ({}, {"uncond_output": x}, {"threshold": "dynamic"}):
            assert noise_calls.denoise_step(plain, x, x, TABLE, **more)[0].shape == shape
