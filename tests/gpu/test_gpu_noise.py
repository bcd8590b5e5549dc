"""The noise ops on a GPU: against float64, without a sync, one launch a step, in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _helpers.noising import (
    LOSSES,
    TARGETS,
    Numbers,
    judge_noising,
    key_on,
    run,
    table_of_steps,
)
from torch import Tensor

import vqkernels
from vqkernels import denoise_coefficients, denoise_step, diffuse, diffusion_loss, normal_noise
from vqkernels.reference import normal_noise as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Samples and how many of their dimensions have levels: few, for each is compiled anew.
PLACES = [((4, 4, 16, 16), 1), ((4, 64, 24), 2), ((2, 1701), 1), ((2, 3, 7), 2)]
STEPS = 10


def test_normal_noise(triton_backend, device):
    key, numbers = key_on(device), Numbers(device)
    for shape in ((3, 1), (2, 3, 8), (2, 70001), (0, 3), (2, 0)):
        for ids in (None, numbers.ids(shape[0])):
            found = run("normal_noise", triton_backend, shape, key, ids, torch.float32)
            exact = run("normal_noise", "reference", shape, key, ids, torch.float32)
            assert found.shape == shape
            assert ((found - exact).abs() <= 2e-6).all()
            for half in DTYPES[1:]:
                rounded = run("normal_noise", triton_backend, shape, key, ids, half)
                assert torch.equal(rounded, found.to(half))


def test_normals_of_extreme_words(triton_backend, device, only_cuda):
    """Within 2e-6 by the hardware's root."""
    from _helpers.normal_pairs import extreme_words, pairs_of

    words = extreme_words(device)
    pairs, exact = pairs_of(words), torch.stack(reference._box_muller(*words.T), 1)
    assert (pairs.double() - exact).abs().max() <= 2e-6
    assert (pairs[words[:, 0] == 2**32 - 1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_diffuse(noise_backend, device, dtype):
    numbers, key = Numbers(device), key_on(device)
    for (shape, dims), target in zip(PLACES, TARGETS, strict=True):
        weights = numbers.normal(shape[:dims]), numbers.normal(shape[:dims])
        x0 = numbers.samples_apart(shape, dtype)
        for given in (
            (None, key, numbers.ids(shape[0])),
            (numbers.normal(shape, torch.float16), None, None),
        ):
            judge_noising("diffuse", noise_backend, x0, *weights, *given, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_diffusion_loss(triton_backend, device, loss, dtype):
    numbers, key = Numbers(device), key_on(device)
    for i, ((shape, dims), target) in enumerate(zip(PLACES, TARGETS, strict=True)):
        at = shape[:dims]
        weights = numbers.normal(at), numbers.normal(at)
        output, x0 = numbers.samples_apart(shape, DTYPES[i % 3]), numbers.normal(shape, dtype)
        rest = (numbers.positive(at), None if loss == "mse" else numbers.positive(at))
        arguments = (output, x0, *weights, None, key, None, *rest, target, loss)
        losses = judge_noising("diffusion_loss", triton_backend, *arguments)
        assert torch.equal(losses, run("diffusion_loss", triton_backend, *arguments))
        # As of a sum over elements: fp16 has no digits for what is far below 1.
        grad = numbers.normal(at) * (x0.numel() // torch.Size(at).numel())
        judge_noising("diffusion_loss_backward", triton_backend, grad, *arguments, i % 2 > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", ["none", "clip", "dynamic"])
def test_denoise_step(noise_backend, device, threshold, dtype):
    """With every term; guided, rescaled and with a dynamic threshold where the row is one for the
    sample."""
    numbers, key = Numbers(device), key_on(device)
    for i, (shape, dims) in enumerate(PLACES):
        whole, count = dims == 1, torch.Size(shape[:dims]).numel()
        if threshold == "dynamic" and not whole:
            continue
        index = (torch.arange(count, device=device) * 5 % 7 - 1).reshape(shape[:dims])
        sample = 2 * numbers.normal(shape, dtype)
        output, uncond, variance = numbers.normal((3, *shape), (dtype, torch.bfloat16)[i % 2])
        history = [numbers.normal(shape, dtype) for _ in range(i + 1)]
        table = table_of_steps(numbers, rescale=whole)
        more = (uncond if whole else None, history, variance, None, key, numbers.ids(shape[0]))
        rest = (threshold, 0.9, "learned_range", True, True)
        judge_noising("denoise_step", noise_backend, sample, output, table, index, *more, *rest)
        plain = (None, [], None, numbers.normal(shape, torch.float16), None, None)
        rest = (threshold, 0.9, "learned_range", False, False)
        judge_noising(
            "denoise_step",
            noise_backend,
            sample,
            output,
            table,
            index[:1].reshape(-1)[0],
            *plain,
            *rest,
        )


def test_quantiles_of_large_samples(noise_backend, device):
    """Exact beyond what torch.quantile takes, in place as well."""
    elements = 3000 if device == "cpu" else (1 << 24) + 12345
    table = denoise_coefficients(prediction_sample=1.0, prev_prediction=1.0).to(device)
    sample = 3 * Numbers(device).normal((2, elements))
    zero = torch.zeros_like(sample)
    more = {"threshold": "dynamic", "ratio": 0.995}
    found = denoise_step(sample, zero, table, **more).prev_sample
    at = 0.995 * (elements - 1)
    sizes = sample.double().abs().sort(1).values
    bound = torch.lerp(sizes[:, int(at)], sizes[:, int(at) + 1], at - int(at))[:, None]
    torch.testing.assert_close(
        found.double(), sample.double().clamp(-bound, bound) / bound, rtol=1e-6, atol=0
    )
    assert torch.equal(denoise_step(sample, zero, table, **more, out=sample).prev_sample, found)


class _Loop:
    """A loop of sampler steps on tensors that stay where they are: table, step and seed on the
    device."""

    def __init__(self, device: str, dtype: torch.dtype, threshold: str = "none") -> None:
        numbers = Numbers(device)
        shape = (4, 4, 16, 16)
        self.start = numbers.normal(shape, dtype)
        self.sample = self.start.clone()
        self.weight = torch.tensor(0.5, device=device, dtype=dtype)
        self.table = denoise_coefficients(
            guidance=3.0,
            prediction_sample=torch.linspace(1.0, 1.5, STEPS),
            prediction_output=-0.6,
            clip=2.5,
            prev_sample=torch.linspace(0.2, 0.9, STEPS),
            prev_prediction=0.3,
            prev_noise=torch.linspace(0.5, 0.0, STEPS),
        ).to(device)
        self.index = torch.zeros((), dtype=torch.int64, device=device)
        self.seed = torch.tensor(2**63 - 25, device=device)
        self.threshold = threshold

    def __call__(self) -> None:
        self.sample.copy_(self.start)
        self.index.zero_()
        for _ in range(STEPS):
            output = self.sample * self.weight
            denoise_step(
                self.sample,
                output,
                self.table,
                index=self.index,
                uncond_output=output * self.weight,
                seed=self.seed,
                threshold=self.threshold,
                out=self.sample,
            )
            self.index += 1

    def expected(self) -> Tensor:
        """The same steps in float64."""
        sample = self.start.double()
        for i in range(STEPS):
            output = sample * self.weight.double()
            noise = normal_noise(
                sample.shape, seed=self.seed, step=i, device=sample.device
            ).double()
            sample = denoise_step(
                sample,
                output,
                self.table,
                index=torch.tensor(i, device=sample.device),
                uncond_output=output * self.weight.double(),
                noise=noise,
                threshold=self.threshold,
            ).prev_sample
        return sample


def test_a_loop_of_steps(noise_backend, device):
    for threshold in ("none", "clip", "dynamic"):
        loop = _Loop(device, torch.float32, threshold)
        loop()
        with_kernels = loop.sample.clone()
        with vqkernels.use_backend("reference"):
            exact = loop.expected()
        assert (with_kernels.double() - exact).abs().max() <= 3e-5 * exact.abs().max()


@pytest.mark.parametrize("threshold", ["none", "dynamic"])
def test_a_loop_does_not_wait_for_the_device(noise_backend, device, only_cuda, threshold):
    loop = _Loop(device, torch.bfloat16, threshold)
    loop()  # compiles
    x0, alpha = loop.start, torch.rand(4, device=device)
    output = x0.clone().requires_grad_()
    diffuse(x0, alpha, alpha, seed=loop.seed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop()
        diffuse(x0, alpha, alpha, seed=loop.seed, step=loop.index)
        normal_noise(x0.shape, seed=loop.seed, device=device, dtype=torch.bfloat16)
        if noise_backend == "triton":  # CUDA C++ has no loss
            diffusion_loss(output, x0, alpha, alpha, seed=loop.seed).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", ["none", "dynamic"])
def test_a_loop_in_a_graph(noise_backend, device, only_cuda, threshold, dtype):
    """Captured once, replayed from another start and seed, the bits of the eager loop."""
    loop = _Loop(device, dtype, threshold)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loop()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    loop.start.copy_(Numbers(device, seed=5).normal(loop.start.shape, dtype))
    loop.seed += 12345
    graph.replay()
    torch.cuda.synchronize()
    replayed = loop.sample.clone()
    loop()
    assert torch.equal(replayed, loop.sample)


def _launches(call: Callable[[], Any]) -> list[str]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]


def test_one_launch(noise_backend, device, only_cuda):
    """Each step, whatever it consists of, and noising."""
    numbers, key = Numbers(device), key_on(device)
    shape = (4, 4, 64, 64)
    x, output, uncond, variance = numbers.normal((4, *shape), torch.bfloat16)
    table, index = table_of_steps(numbers, rescale=True), torch.tensor(1, device=device)
    alpha = numbers.positive((4,))
    plain = (x, output, table, index, None, [], None, None, None, None)
    full = (x, output, table, index, uncond, [x, output], variance, None, key, None)
    rest = (0.995, "learned_range")
    calls = [
        lambda: run("denoise_step", noise_backend, *plain, "none", *rest, False, False),
        lambda: run("denoise_step", noise_backend, *full, "clip", *rest, True, True),
        lambda: run("denoise_step", noise_backend, *full, "dynamic", *rest, True, False),
        lambda: run("diffuse", noise_backend, x, alpha, alpha, None, key, None, "v"),
    ]
    for call in calls:
        assert len(_launches(call)) == 1


def test_elements_beyond_2_to_the_31(triton_backend, device, only_cuda):
    """In one sample, and in several; the last elements are those of their counters."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip(f"{free >> 30} GiB of memory are free")
    key, elements = key_on(device), (1 << 31) + 1000
    quads = torch.arange(elements // 4 - 100, elements // 4, device=device)
    last = reference._four_normals(quads, torch.tensor(0, device=device), key[1], key).reshape(-1)
    noise = run("normal_noise", triton_backend, (1, elements), key, None, torch.bfloat16)
    torch.testing.assert_close(noise[0, -400:].double(), last, rtol=2**-8, atol=2e-6)
    ones = torch.ones(1, device=device)
    x_t, target = run("diffuse", triton_backend, noise, ones, ones, None, key, None, "epsilon")
    assert torch.equal(target[0, -400:], noise[0, -400:])
    torch.testing.assert_close(x_t[0, -400:].double(), 2 * last, rtol=2**-7, atol=4e-6)
    del noise, x_t, target
    many = run("normal_noise", triton_backend, (3, 1 << 30), key, None, torch.bfloat16)
    ids = torch.tensor([2], device=device)
    first = run("normal_noise", triton_backend, (1, 400), key, ids, torch.bfloat16)
    assert torch.equal(many[2, :400], first[0])
