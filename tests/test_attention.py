"""Attention, forward and backward, against PyTorch's formula in float64 and its error in the same
dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _helpers.precision import forward_and_backward
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vqkernels
from vqkernels import attention

every_capability = pytest.mark.every_capability
pytestmark = pytest.mark.usefixtures("one_thread")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
MASKS = ["none", "causal", "bool", "keys", "added", "heads"]


def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape).to(dtype)


def make(
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype = FP32,
    *,
    columns: int | None = None,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    key_heads = key_heads or heads
    return (
        randn(batch, heads, queries, dim, dtype=dtype),
        randn(batch, key_heads, keys, dim, dtype=dtype),
        randn(batch, key_heads, keys, columns or dim, dtype=dtype),
    )


def arguments_of(mask: str, queries: int, keys: int, dtype: torch.dtype) -> dict[str, Any]:
    """One row of "bool" and of "added" sees nothing; "keys" is of each batch, "heads" of each."""
    if mask in ("none", "causal"):
        return {"is_causal": mask == "causal"}
    shape = {"keys": (2, 1, 1, keys), "heads": (1, 2, 1, keys)}.get(mask, (queries, keys))
    allowed = torch.rand(shape) > 0.4
    if mask in ("bool", "added"):
        allowed[queries // 2] = False
    if mask in ("bool", "keys"):
        return {"attn_mask": allowed}
    bias = 3 * torch.randn(shape)
    return {"attn_mask": bias.masked_fill(~allowed, -torch.inf).to(dtype)}


def eager(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        arguments["attn_mask"] = mask.to(q.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **arguments)


def flash(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **arguments)


def judge(
    inputs: tuple[Tensor, Tensor, Tensor], peer: Any = eager, logit: float = 0.0, **arguments: Any
) -> None:
    """Twice the peer's largest error and one unit in the last place of the largest number. In fp32,
    where the peer's error is a matter of luck, 4e-6 of the largest number and what the rounding of
    a score of size `logit` does to its exponential. What is zero in truth, as dq with a single key,
    is a difference of numbers as large as other gradients."""
    q, _, v = inputs
    grads = [randn(*q.shape[:-1], v.shape[-1], dtype=q.dtype)]
    ours = lambda *t: attention(*t, enable_gqa=True, **arguments)  # noqa: E731
    low = lambda *t: peer(*t, **arguments)  # noqa: E731
    plain = lambda *t: eager(*t, **arguments)  # noqa: E731
    found = forward_and_backward(ours, inputs, grads)
    theirs = forward_and_backward(low, inputs, grads)
    exact = forward_and_backward(plain, [t.double() for t in inputs], [g.double() for g in grads])
    magnitudes = [float(t.detach().abs().max()) if t.numel() else 0.0 for t in exact]
    floor = 4e-6 * max(magnitudes)
    for name, mine, their, true, largest in zip(
        ("out", "dq", "dk", "dv"), found, theirs, exact, magnitudes, strict=True
    ):
        assert mine.dtype == q.dtype
        assert mine.shape == true.shape
        if true.numel() == 0:
            continue
        assert mine.isfinite().all(), name
        allowed = 2 * float((their.detach().double() - true.detach()).abs().max())
        allowed += torch.finfo(q.dtype).eps * largest
        if q.dtype == FP32:
            allowed = max(allowed, (4e-6 + 2**-22 * logit) * largest)
        error = float((mine.detach().double() - true.detach()).abs().max())
        assert error <= max(allowed, floor), f"{name}: {error:.3e} > {allowed:.3e}"


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [4, 15, 33, 64, 72, 80, 96, 128, 256])
def test_dimensions(backend: str, dim: int, dtype: torch.dtype) -> None:
    judge(make(37, 53, dim, dtype))
    judge(make(37, 53, dim, dtype), is_causal=True)


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 40), (40, 1), (2, 17), (130, 129), (65, 31), (13, 600)]
)
def test_sizes(backend: str, queries: int, keys: int, dtype: torch.dtype) -> None:
    """Tiles of queries and blocks of keys, forward and backward, have remainders in some."""
    for arguments in ({}, {"is_causal": True}, {"scale": 0.0}, {"scale": -0.3}):
        judge(make(queries, keys, 24, dtype), **arguments)


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("queries", "keys"), [(37, 53), (20, 530)])
def test_masks(backend: str, queries: int, keys: int, mask: str, dtype: torch.dtype) -> None:
    judge(make(queries, keys, 40, dtype), **arguments_of(mask, queries, keys, dtype))


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
def test_heads_that_share_keys(backend: str, mask: str, dtype: torch.dtype) -> None:
    for key_heads in (1, 2, 4):
        inputs = make(30, 45, 16, dtype, heads=4, key_heads=key_heads)
        judge(inputs, **arguments_of(mask, 30, 45, dtype))


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "columns"), [(256, 200), (16, 160), (1, 1), (5, 3)])
def test_values_of_another_width(backend: str, dim: int, columns: int, dtype: torch.dtype) -> None:
    judge(make(20, 35, dim, dtype, columns=columns))


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers(backend: str, dtype: torch.dtype) -> None:
    """One huge logit, means far above the deviation, and the format's largest values."""
    q, k, v = make(24, 70, 64, dtype)
    k[0, 0, 5] *= 60
    q[0, 1, 3] *= 40
    judge((q, k, v), logit=float((q.double() @ k.double().mT / 8).abs().max()))
    q, k, v = make(24, 70, 64, dtype)
    judge((q, k + 30, v), logit=30.0)
    # As in PyTorch's own kernel, a query's delta is formed from its rounded output.
    judge((q, k, v + 100), peer=flash)
    v[0, 0, 7], v[1, 1, 9] = 65504, -65504
    judge((q, k, v), peer=flash)


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_keys(backend: str, dtype: torch.dtype) -> None:
    q, k, v = make(9, 30, 16, dtype)
    allowed = torch.rand(9, 30) > 0.3
    allowed[4] = False
    bias = torch.zeros(9, 30, dtype=dtype).masked_fill(~allowed, -torch.inf)
    for mask in (allowed, bias):
        judge((q, k, v), attn_mask=mask)
        out, lse = attention(q, k, v, attn_mask=mask, return_lse=True)
        assert (out[:, :, 4] == 0).all()
        assert (lse[:, :, 4] == -torch.inf).all()
        seen = lse[:, :, allowed.any(1)]
        assert seen.isfinite().all()


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_finfo_min_in_a_mask(backend: str, dtype: torch.dtype) -> None:
    """A usual "no": beside other keys it hides one, alone it leaves equal weights."""
    q, k, v = make(6, 20, 16, dtype)
    mask = torch.zeros(6, 20, dtype=dtype)
    mask[:, ::3] = torch.finfo(dtype).min
    judge((q, k, v), attn_mask=mask)
    mask[2] = torch.finfo(dtype).min
    if dtype != FP16:  # whose least number leaves scores some digits
        out = attention(q, k, v, attn_mask=mask)[:, :, 2]
        mean = v.double().mean(2)
        bound = 2e-6 if dtype == FP32 else torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), mean, rtol=bound, atol=bound)


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_logarithm_of_the_denominator(backend: str, mask: str, dtype: torch.dtype) -> None:
    q, k, v = make(21, 34, 20, dtype)
    arguments = arguments_of(mask, 21, 34, dtype)
    out, lse = attention(q, k, v, return_lse=True, **arguments)
    scores = q.double() @ k.double().mT / math.sqrt(20)
    allowed = torch.ones(21, 34).bool().tril() if mask == "causal" else arguments.get("attn_mask")
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    exact = scores.logsumexp(-1)
    assert lse.dtype == FP32
    assert not lse.requires_grad
    # bf16 sums weights as the product with v sees them, rounded.
    bound = 2e-6 if dtype != BF16 else torch.finfo(BF16).eps
    torch.testing.assert_close(lse.double(), exact, rtol=bound, atol=bound)
    assert torch.equal(out, attention(q, k, v, **arguments))


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_in_its_row(backend: str, dtype: torch.dtype) -> None:
    q, k, v = make(20, 40, 16, dtype)
    clean = attention(q, k, v)
    q[0, 1, 3, 2] = torch.nan
    out = attention(q, k, v)
    assert out[0, 1, 3].isnan().all()
    out[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(out, clean)


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_give_what_their_copies_give(native_cpu: None, dtype: torch.dtype) -> None:
    batch, tokens, heads, dim = 2, 30, 3, 24
    packed = randn(batch, tokens, 3, heads, dim, dtype=dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    columns = randn(batch, heads, dim, tokens, dtype=dtype).mT
    shared = randn(1, 1, tokens, dtype=dtype).mT[None].expand(batch, heads, -1, dim)
    mask = (torch.randn(tokens, tokens) > 0).mT
    grad = randn(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    for inputs in ((q, k, v), (columns, k, v.flip(2)), (q, shared, columns)):
        for arguments in ({}, {"attn_mask": mask}):
            function = lambda *t, a=arguments: attention(*t, **a)  # noqa: E731
            found = forward_and_backward(function, inputs, [grad])
            copies = [t.contiguous() for t in inputs]
            dense = {name: t.contiguous() for name, t in arguments.items()}
            function = lambda *t, a=dense: attention(*t, **a)  # noqa: E731
            expected = forward_and_backward(function, copies, [grad.contiguous()])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    out = attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()  # so that heads join without a copy


def test_packed_qkv_is_read_in_place(native_cpu: None) -> None:
    q, k, v = randn(1, 256, 3, 4, 64).permute(2, 0, 3, 1, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        attention(q, k, v)
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.events())
    assert allocated < q.numel() * 4 + 4 * 256 * 4 + 1024


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "causal", "added"])
def test_same_bits_at_any_number_of_threads(
    native_cpu: None, restored_threads: None, mask: str, dtype: torch.dtype
) -> None:
    inputs = make(450, 1100, 40, dtype, batch=1, heads=2, key_heads=1)
    if mask == "added":
        arguments = {"attn_mask": randn(450, 1100, dtype=dtype)}
    else:
        arguments = arguments_of(mask, 450, 1100, dtype)
    grad = randn(1, 2, 450, 40, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        function = lambda *t: attention(*t, enable_gqa=True, **arguments)  # noqa: E731
        results.append(forward_and_backward(function, inputs, [grad]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    judge(inputs, **arguments)


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 2, 4, 5, 8), (2, 2, 0, 5, 8), (2, 2, 4, 0, 8), (2, 2, 4, 5, 0)]
)
def test_empty(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, queries, keys, dim = shape
    q = randn(batch, heads, queries, dim, dtype=dtype)
    k, v = (randn(batch, heads, keys, dim, dtype=dtype) for _ in range(2))
    out, dq, dk, dv = forward_and_backward(attention, (q, k, v), [torch.ones_like(q)])
    assert out.shape == q.shape
    for grad, given in ((dq, q), (dk, k), (dv, v)):
        assert grad.shape == given.shape
        assert (grad == 0).all()
    assert (out == 0).all()


def test_float64_goes_to_the_reference() -> None:
    inputs = tuple(t.double() for t in make(12, 17, 8))
    assert vqkernels.explain("attention", *inputs).backend == "reference"
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, is_causal=True), leaves)
    assert attention(*leaves, return_lse=True)[1].dtype == torch.float64


def test_explain_names_the_kernel(native_cpu: None) -> None:
    with vqkernels.use_backend("auto"):
        assert vqkernels.explain("attention", *make(4, 4, 8, BF16)).backend == "cpu"


def test_a_mask_may_learn(backend: str) -> None:
    q, k, v = make(5, 6, 8)
    bias = torch.randn(2, 5, 6, requires_grad=True)
    (found,) = torch.autograd.grad(attention(q, k, v, attn_mask=bias).square().sum(), bias)
    wide = bias.detach().double().requires_grad_()
    out = eager(q.double(), k.double(), v.double(), attn_mask=wide)
    (expected,) = torch.autograd.grad(out.square().sum(), wide)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_takes_its_dtype(backend: str, dtype: torch.dtype) -> None:
    q, k, v = make(7, 9, 16)
    mask = torch.randn(7, 9)
    plain = attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        out = attention(q, k, v, attn_mask=mask)
        theirs = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == theirs.dtype == dtype
    assert torch.equal(out, plain)
    leaf = q.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = attention(leaf, k, v)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad.dtype == FP32


def test_no_second_derivative(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in make(4, 5, 8))
    (grad,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(backend: str, dynamic: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    def loss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out, lse = attention(q, k, v, attn_mask=mask, return_lse=True)
        return attention(out, k, v, is_causal=True).square().sum() + lse.sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=dynamic)
    for queries in (9, 12) if dynamic else (9, 9):
        inputs = [t.requires_grad_() for t in make(queries, 11, 8)]
        mask = torch.rand(queries, 11) > 0.3
        expected = torch.autograd.grad(loss(*inputs, mask), inputs)
        found = torch.autograd.grad(compiled(*inputs, mask), inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counter.frame_count == 1
