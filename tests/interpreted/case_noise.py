"""`normal_noise`, `diffuse` and `diffusion_loss` in Triton: the same integers as the reference, and
values against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from _helpers.noising import (
    LOSSES,
    SEED,
    STEP,
    STREAM,
    TARGETS,
    Numbers,
    judge_noising,
    key_on,
    noised,
    run,
)
from _helpers.normal_pairs import extreme_words, pairs_of

from vqkernels.reference import normal_noise as reference
from vqkernels.triton import diffusion_loss, normal_noise
from vqkernels.triton.noise_configs import config_of
from vqkernels.triton.normals import philox4x32
from vqkernels.triton.samples import drawn_block

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (3, 1), (2, 3, 8), (2, 2, 3, 5), (2, 1100)]
KEY = key_on("cpu")


@triton.jit
def _words(counters, seed, words, N: tl.constexpr):
    at = tl.arange(0, N) * 4
    found = philox4x32(
        tl.load(seed),
        tl.load(counters + at).to(tl.uint32),
        tl.load(counters + at + 1).to(tl.uint32),
        tl.load(counters + at + 2).to(tl.uint32),
        tl.load(counters + at + 3).to(tl.uint32),
    )
    for i in tl.static_range(4):
        tl.store(words + at + i, found[i].to(tl.int64))


@triton.jit
def _block(key, found, start, N: tl.constexpr):
    z = drawn_block(key, None, tl.program_id(0), start, tl.load(key + 1), N, False)
    tl.store(found + tl.arange(0, N), z)


@pytest.mark.parametrize("seed", [0, -1, SEED, 2**63 - 1, 2**32])
def test_the_same_words(seed):
    counters = torch.randint(0, 2**32, (512, 4))
    counters[:16] = torch.cartesian_prod(*[torch.tensor([0, 2**32 - 1])] * 4)
    words, key = torch.empty_like(counters), torch.tensor(seed)
    _words[(1,)](counters, key, words, N=512)
    expected = reference.philox4x32(tuple(counters.T), (key, key >> 32))
    assert torch.equal(words, torch.stack(expected, 1))


def test_normals_of_extreme_words():
    words = extreme_words("cpu")
    pairs, exact = pairs_of(words), torch.stack(reference._box_muller(*words.T), 1)
    assert (pairs.double() - exact).abs().max() <= 1.2e-6
    assert (pairs[words[:, 0] == 2**32 - 1] == 0).all()


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3), (2, 0), (3, 4, 700)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_noise(shape, dtype):
    numbers = Numbers("cpu")
    for ids in (None, numbers.ids(shape[0])):
        found = normal_noise(shape, KEY, ids, dtype)
        assert (found.shape, found.dtype) == (shape, dtype)
        if found.numel() == 0:
            continue
        exact = reference.normal_noise(shape, KEY, ids, torch.float32)
        if dtype == torch.float32:
            assert (found - exact).abs().max() <= 2e-6
        else:
            whole = normal_noise(shape, KEY, ids, torch.float32)
            assert torch.equal(found, whole.to(dtype))


def test_a_sample_does_not_depend_on_its_batch():
    ids = torch.tensor([5, 2**32 + 3, -1])
    together = normal_noise((3, 70), KEY, ids, torch.float32)
    for i in range(3):
        alone = normal_noise((1, 70), KEY, ids[i : i + 1] + 2**32, torch.float32)
        assert torch.equal(alone[0], together[i])
    longer = normal_noise((3, 90), KEY, ids, torch.float32)
    assert torch.equal(longer[:, :70], together)
    for place in range(3):
        other = KEY.clone()
        other[place] += 1
        changed = normal_noise((3, 70), other, ids, torch.float32)
        assert (changed == together).float().mean() < 0.01
    high = torch.tensor([SEED, STEP + 2**40, STREAM - 2**33])
    assert torch.equal(normal_noise((3, 70), high, ids, torch.float32), together)


def test_the_last_elements_of_a_sample():
    """Element 2^34 - 1 has the last counter: 64 bits of elements, 32 of counters."""
    found = torch.empty(128)
    _block[(1,)](KEY, found, 2**34 - 128, N=128)
    quads = torch.arange(2**32 - 32, 2**32)
    expected = reference._four_normals(quads, torch.tensor(0), KEY[1], KEY)
    assert (found - expected.reshape(-1)).abs().max() <= 2e-6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_diffuse(target, dtype):
    numbers = Numbers("cpu")
    for shape in SHAPES:
        for arguments in noised(numbers, shape, dtype):
            x_t, of_target = judge_noising("diffuse", "triton", *arguments, target)
            assert x_t.is_contiguous()
            assert (x_t.dtype, of_target.dtype) == (dtype, dtype)
            if target == "sample":
                assert torch.equal(of_target, arguments[0])


def test_diffuse_nothing():
    for shape in ((0, 4), (3, 0)):
        weights = torch.ones(shape[:1])
        found = run("diffuse", "triton", torch.empty(shape), weights, weights, None, KEY, None, "v")
        assert [tuple(t.shape) for t in found] == [shape, shape]


@pytest.mark.parametrize(
    ("dtype", "loss"),
    [*((DTYPES[0], loss) for loss in LOSSES), (DTYPES[1], "mse"), (DTYPES[2], "huber")],
)
@pytest.mark.parametrize("target", TARGETS)
def test_diffusion_loss(dtype, target, loss):
    numbers = Numbers("cpu")
    for i, shape in enumerate(SHAPES[1:]):
        for j, arguments in enumerate(noised(numbers, shape, dtype)):
            at = arguments[1].shape
            output = numbers.samples_apart(shape, DTYPES[(i + j) % 3])
            weight = numbers.positive(at) if j % 2 else None
            delta = None if loss == "mse" else numbers.positive(at)
            arguments = (output, *arguments, weight, delta, target, loss)
            losses = judge_noising("diffusion_loss", "triton", *arguments)
            assert losses.dtype == torch.float32
            # As of a sum over elements: fp16 has no digits for what is far below 1.
            grad = numbers.normal(at) * (output.numel() // torch.Size(at).numel())
            needs_x0 = j % 3 > 0
            judge_noising("diffusion_loss_backward", "triton", grad, *arguments, needs_x0)


def test_losses_of_many_chunks():
    """In whatever chunks, and as a sum of the same numbers each time."""
    numbers = Numbers("cpu")
    output, x0 = numbers.normal((2, 3, 700)), numbers.normal((2, 3, 700))
    weights = numbers.normal((2,)), numbers.normal((2,)), None, KEY, None
    rest = (numbers.positive((2,)), None, "v", "mse")
    exact = judge_noising("diffusion_loss", "triton", output, x0, *weights, *rest)
    for chunk in (128, 256, 1024):
        config = dataclasses.replace(config_of("loss"), block=128, num_warps=1, chunk=chunk)
        found = diffusion_loss(output, x0, *weights, *rest, config=config)
        torch.testing.assert_close(found, exact, rtol=2e-6, atol=0)
        again = diffusion_loss(output, x0, *weights, *rest, config=config)
        assert torch.equal(found, again)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_beyond_numbers(loss):
    """An infinite output has an infinite loss, a NaN a NaN, and neither touches another level."""
    output, x0 = torch.zeros(4, 6), torch.zeros(4, 6)
    output[0, 1], output[1, 5], output[2, 0] = torch.inf, torch.nan, 1e30
    weights = torch.zeros(4), torch.zeros(4)
    delta = None if loss == "mse" else torch.full((4,), 0.5)
    rest = (None, None, None, delta, "sample", loss)
    found = run("diffusion_loss", "triton", output, x0, *weights, torch.zeros(4, 6), *rest)
    assert found[0] == torch.inf
    assert found[1].isnan()
    assert found[2] > 1e28
    assert found[3] == 0
    grads = run(
        "diffusion_loss_backward",
        "triton",
        torch.ones(4),
        output,
        x0,
        *weights,
        torch.zeros(4, 6),
        *rest,
        True,
    )
    assert all(grad[1, 5].isnan() and (grad[3] == 0).all() for grad in grads)
