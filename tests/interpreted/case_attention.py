"""Attention and its gradients against float64, and half precision against PyTorch's own error."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels.reference import attention as reference
from vqkernels.triton import attention, attention_backward
from vqkernels.triton.attention import is_of_keys
from vqkernels.triton.attention_configs import (
    CONFIGS,
    Parts,
    parts_of,
    select_attention,
)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
HALVES = (FP16, BF16)
# Small tiles, so that few rows take several of them; 16 is the smallest step of a product.
FORWARD = dataclasses.replace(CONFIGS[0], block_q=32, block_k=16)
BACKWARD = (
    dataclasses.replace(CONFIGS[0], block_q=16, block_k=32),
    dataclasses.replace(CONFIGS[0], block_q=16, block_k=32),
)


@dataclasses.dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float = 0.0

    def __post_init__(self) -> None:
        self.scale = self.scale or 1 / math.sqrt(self.q.shape[-1])
        if self.attn_mask is not None:
            scores = (*self.q.shape[:3], self.k.shape[2])
            self.attn_mask = self.attn_mask.expand(scores)

    @property
    def more(self) -> tuple[Tensor | None, bool, float]:
        return self.attn_mask, self.is_causal, self.scale


def make(
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype = FP32,
    *,
    columns: int | None = None,
    heads: int = 2,
    key_heads: int | None = None,
    batch: int = 1,
    **more,
) -> Problem:
    generator = torch.Generator().manual_seed(queries + 7 * keys + 31 * dim)
    shapes = ((heads, queries, dim), (key_heads or heads, keys, dim))
    shapes += ((key_heads or heads, keys, columns or dim),)
    tensors = (torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)
    return Problem(*tensors, **more)


def mask_of(kind: str, queries: int, keys: int, dtype: torch.dtype = FP32) -> Tensor:
    """ "bool", "keys" (of each batch, the rest broadcast), "added", "heads" (added for each)."""
    generator = torch.Generator().manual_seed(5)
    shape = {"keys": (2, 1, 1, keys), "heads": (1, 2, 1, keys)}.get(kind, (queries, keys))
    allowed = torch.rand(shape, generator=generator) > 0.4
    if kind in ("bool", "keys"):
        return allowed
    bias = 3 * torch.randn(shape, generator=generator)
    return bias.masked_fill(~allowed, -torch.inf).to(dtype)


def float64_of(problem: Problem, grad: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """(out, dq, dk, dv) and lse, with gradients by PyTorch's autograd of the formula."""
    q, k, v = (t.double().detach().requires_grad_() for t in (problem.q, problem.k, problem.v))
    group = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ keys.mT * problem.scale
    mask = problem.attn_mask
    if problem.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(unseen, 0.0).softmax(-1).masked_fill(unseen, 0.0)
    out = weights @ values
    grads = torch.autograd.grad(out, (q, k, v), grad.double())
    return (out.detach(), *grads), scores.detach().logsumexp(-1)


def ours(problem: Problem, grad: Tensor, small: bool = True) -> tuple[tuple[Tensor, ...], Tensor]:
    config, configs = (FORWARD, BACKWARD) if small else (None, None)
    q, k, v = problem.q, problem.k, problem.v
    out, lse = attention(q, k, v, *problem.more, config=config)
    arguments = (grad, q, k, v, out, lse, *problem.more)
    return (out, *attention_backward(*arguments, configs=configs)), lse


def grad_of(problem: Problem) -> Tensor:
    shape = (*problem.q.shape[:3], problem.v.shape[-1])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    return grad.to(problem.q.dtype)


def check(problem: Problem, small: bool = True) -> None:
    """fp32: rounding of sums over keys, queries and columns, in units of the largest value."""
    grad = grad_of(problem)
    results, lse = ours(problem, grad, small)
    expected, expected_lse = float64_of(problem, grad)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)
    for result, right in zip(results, expected, strict=True):
        assert result.dtype == problem.q.dtype
        assert result.shape == right.shape
        torch.testing.assert_close(
            result.double(), right, rtol=0, atol=4e-6 * max(1.0, right.abs().max().item())
        )


def judge(problem: Problem, small: bool = True) -> None:
    """Half precision: at most twice the error of PyTorch's formula on the same inputs, and one step
    of the dtype at the largest value."""
    grad = grad_of(problem)
    results, lse = ours(problem, grad, small)
    expected, expected_lse = float64_of(problem, grad)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)
    q, k, v = (t.detach().requires_grad_() for t in (problem.q, problem.k, problem.v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=problem.attn_mask,
            is_causal=problem.is_causal,
            scale=problem.scale,
            enable_gqa=True,
        )
    eager = (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))
    for result, right, theirs in zip(results, expected, eager, strict=True):
        assert result.dtype == problem.q.dtype
        _, exponent = torch.frexp(right.abs().max())
        step = torch.finfo(result.dtype).eps * 2.0 ** (exponent.item() - 1)
        # What is zero in truth, as dq with a single key, is a difference of fp32 numbers near 1.
        allowed = 2 * (theirs.double() - right).abs().max() + max(step, 1e-6)
        assert (result.double() - right).abs().max() <= allowed


@pytest.mark.parametrize("dim", [4, 33, 64, 72, 80, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dimensions(dim, is_causal):
    check(make(37, 53, dim, is_causal=is_causal))
    judge(make(37, 53, dim, BF16, is_causal=is_causal))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [64, 72])
def test_table_configurations(dim, dtype):
    judge(make(70, 130, dim, dtype, heads=1), small=False)
    judge(make(130, 70, dim, dtype, heads=1, is_causal=True), small=False)


def test_table_configurations_in_fp32():
    check(make(70, 130, 72, heads=1, is_causal=True), small=False)


@pytest.mark.parametrize(("dim", "columns"), [(256, 200), (16, 160), (192, 24), (1, 1), (5, 3)])
def test_values_of_another_width(dim, columns):
    check(make(20, 35, dim, columns=columns, heads=1))
    judge(make(20, 35, dim, FP16, columns=columns, heads=1))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (40, 1), (16, 32), (65, 31)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sizes(queries, keys, is_causal):
    check(make(queries, keys, 24, is_causal=is_causal))
    judge(make(queries, keys, 24, BF16, is_causal=is_causal))


@pytest.mark.parametrize("kind", ["bool", "keys", "added", "heads"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_masks(kind, dtype):
    mask = mask_of(kind, 37, 53, dtype)
    problem = make(37, 53, 40, dtype, batch=2, attn_mask=mask)
    (check if dtype == FP32 else judge)(problem)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_strides_of_a_mask(kind):
    mask = mask_of(kind, 53, 37).T
    check(make(37, 53, 16, attn_mask=mask))
    wide = mask.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    check(make(37, 53, 16, attn_mask=wide))
    check(make(37, 53, 16, attn_mask=mask[:, :1]))


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_queries_without_a_key(kind, dtype):
    mask = mask_of(kind, 37, 53, dtype)
    nothing = torch.tensor([0, 5, 20, 36])
    mask[nothing] = False if kind == "bool" else -torch.inf
    problem = make(37, 53, 40, dtype, attn_mask=mask)
    (out, dq, dk, dv), lse = ours(problem, grad_of(problem))
    assert (out[:, :, nothing] == 0).all()
    assert (dq[:, :, nothing] == 0).all()
    assert (lse[:, :, nothing] == -torch.inf).all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()
    if dtype == FP32:
        check(problem)
    problem.attn_mask = torch.zeros_like(problem.attn_mask, dtype=torch.bool)
    results, lse = ours(problem, grad_of(problem))
    assert all((result == 0).all() for result in results)
    assert (lse == -torch.inf).all()


def test_no_keys():
    problem = make(5, 3, 8)
    problem.k, problem.v = problem.k[:, :, :0], problem.v[:, :, :0]
    (out, dq, dk, _), lse = ours(problem, grad_of(problem))
    assert (out == 0).all()
    assert (dq == 0).all()
    assert (lse == -torch.inf).all()
    assert dk.shape == problem.k.shape


def test_no_queries():
    problem = make(5, 3, 8)
    problem.q = problem.q[:, :, :0]
    (out, _, dk, dv), lse = ours(problem, grad_of(problem))
    assert out.shape == (1, 2, 0, 8)
    assert lse.shape == (1, 2, 0)
    assert (dk == 0).all()
    assert (dv == 0).all()


def test_masks_of_the_least_number():
    """finfo.min keeps a key out as -inf does, and is no infinity where a query has nothing else."""
    least = torch.finfo(FP32).min
    mask = mask_of("added", 37, 53)
    infinite = make(37, 53, 16, attn_mask=mask)
    finite = make(37, 53, 16, attn_mask=mask.masked_fill(mask == -torch.inf, least))
    grad = grad_of(infinite)
    for one, other in zip(ours(infinite, grad)[0], ours(finite, grad)[0], strict=True):
        assert torch.equal(one, other)
    finite.attn_mask = torch.full((37, 53), least).expand(1, 2, 37, 53)
    (out, *grads), _ = ours(finite, grad)
    mean = finite.v.mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, rtol=0, atol=1e-6)
    assert all((of == 0).all() for of in grads)


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_that_share_keys(heads, is_causal):
    check(make(37, 53, 24, heads=heads[0], key_heads=heads[1], batch=2, is_causal=is_causal))
    judge(make(37, 53, 24, BF16, heads=heads[0], key_heads=heads[1], is_causal=is_causal))


def test_mask_of_heads_that_share_keys():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 4, 21, 30, generator=generator) > 0.3
    check(make(21, 30, 24, heads=4, key_heads=2, batch=2, attn_mask=mask))


@pytest.mark.parametrize("scale", [0.5, 1e-30, -0.3])
def test_scales(scale):
    check(make(37, 53, 24, scale=scale))
    check(make(37, 53, 24, scale=scale, is_causal=True))


def test_scale_of_zero():
    problem = make(20, 30, 16, is_causal=True)
    problem.scale = 0.0
    check(problem)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("dim", [64, 72])
def test_packed_tensors_are_read_in_place(dim, dtype):
    batch, rows, heads = 2, 37, 3
    generator = torch.Generator().manual_seed(3)
    packed = torch.randn(batch, rows, 3, heads, dim, generator=generator).to(dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    problem = Problem(q, k, v)
    (check if dtype == FP32 else judge)(problem)
    alone = Problem(*(t.contiguous() for t in (q, k, v)))
    grad = grad_of(problem)
    seen, copied = ours(problem, grad), ours(alone, grad)
    for one, other in zip((*seen[0], seen[1]), (*copied[0], copied[1]), strict=True):
        assert torch.equal(one, other)
    assert seen[0][0].stride() == (rows * heads * dim, dim, heads * dim, 1)
    for of, like in zip(seen[0][1:], (q, k, v), strict=True):
        assert of.stride() == torch.empty_like(like).stride()


def test_columns_apart_are_copied():
    problem = make(37, 53, 24)
    expected = ours(problem, grad_of(problem))
    q, k, v = (t.mT.contiguous().mT for t in (problem.q, problem.k, problem.v))
    grad = grad_of(problem).mT.contiguous().mT
    results = ours(Problem(q, k, v), grad)
    for one, other in zip(results[0], expected[0], strict=True):
        assert torch.equal(one, other)
    assert results[0][1].stride() == torch.empty_like(q).stride()


def test_an_expanded_gradient():
    problem = make(37, 53, 24)
    grad = torch.ones(()).expand(1, 2, 37, 24)
    results, _ = ours(problem, grad)
    expected, _ = float64_of(problem, grad)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_outliers(dtype):
    """One huge score, values near the end of fp16, and an offset that cancels in the softmax."""
    problem = make(37, 53, 64, dtype)
    problem.q[:, :, 3], problem.k[:, :, 7] = 30.0, 30.0
    problem.v[:, :, 9, 5] = 60000.0
    (out, *_), lse = ours(problem, grad_of(problem))
    assert out.isfinite().all()
    assert lse[0, 0, 3] > 7000
    torch.testing.assert_close(out[:, :, 3], problem.v[:, :, 7])
    offset = make(37, 53, 64, dtype)
    offset.k = offset.k + 8
    (check if dtype == FP32 else judge)(offset)


def test_a_nan_stays_in_its_row():
    problem = make(37, 53, 24)
    problem.q[0, 1, 5, 3] = torch.nan
    out, lse = attention(problem.q, problem.k, problem.v, *problem.more, config=FORWARD)
    assert out[0, 1, 5].isnan().all()
    assert lse[0, 1, 5].isnan()
    out[0, 1, 5] = 0
    assert out.isfinite().all()


def test_keys_of_the_future_are_not_read():
    problem = make(37, 53, 24, is_causal=True)
    expected, _ = attention(problem.q, problem.k, problem.v, *problem.more, config=FORWARD)
    problem.k[:, :, 20:], problem.v[:, :, 20:] = 1e4, 7.0
    out, _ = attention(problem.q, problem.k, problem.v, *problem.more, config=FORWARD)
    assert torch.equal(out[:, :, :20], expected[:, :, :20])
    assert not torch.equal(out[:, :, 20], expected[:, :, 20])


def test_the_same_bits_again():
    problem = make(37, 53, 24, BF16, heads=4, key_heads=2)
    grad = grad_of(problem)
    first, second = ours(problem, grad), ours(problem, grad)
    for one, other in zip(first[0], second[0], strict=True):
        assert torch.equal(one, other)


def test_the_reference_op_agrees():
    problem = make(37, 53, 24, attn_mask=mask_of("bool", 37, 53))
    grad = grad_of(problem)
    (out, *grads), lse = ours(problem, grad)
    tensors = (problem.q, problem.k, problem.v)
    theirs = reference.attention_with_lse(*tensors, *problem.more)
    torch.testing.assert_close((out, lse), theirs, rtol=0, atol=4e-6)
    right = reference.attention_backward(grad, *tensors, *theirs, *problem.more)
    torch.testing.assert_close(tuple(grads), right, rtol=0, atol=1e-5)


def test_parts():
    expected = {
        1: (16, 0), 16: (16, 0), 17: (32, 0), 33: (32, 16), 48: (32, 16), 64: (64, 0),
        72: (64, 16), 80: (64, 16), 96: (64, 32), 97: (128, 0), 128: (128, 0), 192: (128, 64),
        200: (256, 0), 256: (256, 0),
    }  # fmt: skip
    assert {columns: parts_of(columns) for columns in expected} == {
        columns: Parts(*parts) for columns, parts in expected.items()
    }
    assert all(parts_of(columns).padded >= columns for columns in range(1, 257))


def test_every_row_can_be_selected():
    selected = {
        select_attention(kernel, capability, products, dim)
        for kernel in ("forward", "queries", "keys")
        for capability in (80, 86, 90, 100, 120)
        for products in ("half", "split")
        for dim in (16, 64, 80, 128, 256)
    }
    assert selected == set(CONFIGS)
    with pytest.raises(ValueError, match="at most 256 columns, got 272"):
        select_attention("forward", 90, "half", 272)


def test_a_mask_of_queries_and_keys_needs_room_and_so_does_dropout():
    plain = select_attention("forward", 90, "half", 128)
    assert not plain.spare
    assert select_attention("forward", 90, "half", 128, crowded=True).spare
    wide = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    assert not is_of_keys(wide)
    assert is_of_keys(wide[:, :, :1])
    assert is_of_keys(wide[:, :, :1].expand(2, 2, 5, 7))
