"""The noise ops of the CUDA object on tensors of the CPU: compiled as for a GPU, over emulated
kernels. It shows that layouts, levels, tables and empty inputs reach the launchers as they should;
the kernels themselves are tested in tests/emulated.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vqkernels.ops.denoise_step import denoise_coefficients
from vqkernels.reference import denoise_step as step_reference
from vqkernels.reference import diffuse as diffuse_reference
from vqkernels.reference import normal_noise as normal_reference

Ops = torch._ops._OpNamespace
KEY = torch.tensor([2**40 + 3, 7, -1])
TABLE = denoise_coefficients(
    guidance=[3, 1.5],
    guidance_rescale=[0, 0.6],
    prediction_sample=[1.1, 1],
    prediction_output=[-0.5, -1],
    clip=[0.8, 1.3],
    prev_sample=[0.5, 0.3],
    prev_prediction=[0.4, 0.7],
    prev_history_0=[0.2, -0.3],
    prev_history_1=[0, 0.1],
    prev_noise=[0.3, 0.5],
    variance_log_min=-3,
    variance_log_max=-1,
    extra_output=1,
)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channel-half": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "batch-half": lambda x: torch.cat([x, x])[len(x) :],
    "every-other": lambda x: torch.stack([x, x], 1)[:, 0],
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "shifted": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "broadcast": lambda x: x[:1].expand_as(x),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def assert_alike(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 8, 8), (0, 5), (2, 0), (4,)])
def test_normal_noise(ops: Ops, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for ids in (None, torch.arange(2 * shape[0])[::2]):
            expected = normal_reference.normal_noise(shape, KEY, ids, dtype)
            found = ops.normal_noise(shape, KEY, ids, dtype, [])
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=3e-6)
            out = torch.empty(shape, dtype=dtype)
            ops.normal_noise(shape, KEY, ids, dtype, [out])
            assert torch.equal(out, found)


@layouts
def test_layouts_of_diffuse(ops: Ops, layout: str) -> None:
    of = LAYOUTS[layout]
    x0, noise = (of(draw(2, 3, 4, 8)) for _ in range(2))
    for levels in ((2,), (2, 3), (2, 3, 4)):
        alpha, sigma = torch.rand(levels), torch.rand(*levels, 2)[..., 0]
        for given, key in ((noise, None), (None, KEY)):
            arguments = (x0, alpha, sigma, given, key, None, "v")
            expected = diffuse_reference.diffuse(*arguments)
            assert_alike(ops.diffuse(*arguments, []), expected)
            out = [torch.empty(2, 3, 4, 8, dtype=x0.dtype) for _ in range(2)]
            ops.diffuse(*arguments, out)
            assert_alike(tuple(out), expected)


@pytest.mark.parametrize("target", ["epsilon", "sample", "v", "flow"])
def test_gradients_draw_the_noise_again(ops: Ops, target: str) -> None:
    x0 = torch.randn(2, 3, 8, requires_grad=True)
    alpha, sigma = (torch.rand(2, 3, requires_grad=True) for _ in range(2))
    leaves = (x0, alpha, sigma)
    results = []
    for backend in ("cuda", "reference"):
        outputs = torch.ops.vqkernels.diffuse(*leaves, None, KEY, None, target, backend)
        grads = torch.autograd.grad(
            outputs, leaves, [torch.ones_like(of) for of in outputs], allow_unused=True
        )
        results.append([*outputs, *grads])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)


@layouts
def test_layouts_of_denoise_step(ops: Ops, layout: str) -> None:
    """Each operand in turn, then all."""
    of = LAYOUTS[layout]
    shape, count = (2, 3, 4, 8), 7
    for turned in (*((i,) for i in range(count)), tuple(range(count))):
        operands = [of(draw(*shape)) if i in turned else draw(*shape) for i in range(count)]
        sample, output, uncond, variance, noise, *history = operands
        for index in (torch.tensor(1), torch.tensor([[0, 5], [1, 5]])[:, 0]):
            for threshold in ("none", "clip", "dynamic"):
                for guidance in (None, uncond):
                    arguments = (
                        sample, output, TABLE, index, guidance, history, variance, noise, None,
                        None, threshold, 0.9, "learned_range", True, True,
                    )  # fmt: skip
                    expected = step_reference.denoise_step(*arguments)
                    assert_alike(ops.denoise_step(*arguments, []), expected)
                    out = torch.empty(shape, dtype=sample.dtype)
                    ops.denoise_step(*arguments, [out])
                    assert_alike((out,), expected[:1])


def test_a_table_and_results_of_every_kind(ops: Ops) -> None:
    """A table inside a wider one, single rows of samples and tokens, results that are not asked
    for, a next sample in the sample's place."""
    strided = torch.stack([TABLE, TABLE], 1)[:, 0]
    sample, output = draw(2, 6, 8), draw(2, 6, 8, dtype=torch.float32)
    for index in (torch.tensor([1, 0]), torch.randint(-1, 3, (2, 6)), torch.tensor(9)):
        for wants in ((False, False), (True, False), (False, True)):
            arguments = (
                sample, output, strided, index, None, [], None, None, KEY, torch.tensor([5, 9]),
                "clip", 0.9, "learned", *wants,
            )  # fmt: skip
            expected = step_reference.denoise_step(*arguments)
            found = ops.denoise_step(*arguments, [])
            assert_alike(found, expected)
            copy = sample.clone()
            ops.denoise_step(copy, *arguments[1:], [copy])
            assert torch.equal(copy, found[0])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1,), (3, 1)])
def test_few_or_no_elements(ops: Ops, shape: tuple[int, ...]) -> None:
    x, level = draw(*shape, dtype=torch.float32), torch.rand(shape[0])
    assert_alike(
        ops.diffuse(x, level, level, None, KEY, None, "flow", []),
        diffuse_reference.diffuse(x, level, level, None, KEY, None, "flow"),
    )
    for uncond in (None, x):
        arguments = (x, x, TABLE, torch.tensor(1), uncond, [x], None, None, KEY, None, "none", 0.9,
                     "learned", True, False)  # fmt: skip
        found = ops.denoise_step(*arguments, [])
        assert_alike(found, step_reference.denoise_step(*arguments))


def test_what_kernels_do_not_take_is_refused(ops: Ops) -> None:
    x = draw(2, 4)
    levels = torch.zeros(2, 4, dtype=torch.int64)
    for uncond, threshold, named in ((x, "none", "guidance"), (None, "dynamic", "thresholds")):
        with pytest.raises(ValueError, match=rf"index must be a scalar or \[B\] with .*{named}"):
            ops.denoise_step(x, x, TABLE, levels, uncond, [], None, None, None, None, threshold,
                             0.9, "learned", False, False, [])  # fmt: skip
    huge = x[:1, :1].expand(1, 1 << 32)
    with pytest.raises(ValueError, match=r"fewer than 2\^32 elements, got 4294967296"):
        ops.denoise_step(huge, huge, TABLE, torch.tensor(0), None, [], None, None, None, None,
                         "dynamic", 0.9, "learned", False, False, [huge])  # fmt: skip
