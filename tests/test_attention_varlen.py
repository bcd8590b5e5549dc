"""Attention of varying lengths: every sequence is what `attention` makes of it alone."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from _helpers.precision import forward_and_backward
from torch import Tensor

import vqkernels
from vqkernels import attention, attention_varlen

every_capability = pytest.mark.every_capability
pytestmark = pytest.mark.usefixtures("one_thread")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
Lengths = tuple[tuple[int, int], ...]
# Queries and keys: one of each, nothing of either, remainders of tiles, several blocks of keys.
LENGTHS: Lengths = ((5, 37), (0, 9), (6, 0), (1, 1), (130, 129), (0, 0), (200, 20), (13, 600))


def places(lengths: Lengths) -> dict[str, Any]:
    queries, keys = (list(accumulate(n, initial=0)) for n in zip(*lengths, strict=True))
    return {
        "cu_seqlens_q": torch.tensor(queries, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(keys, dtype=torch.int32),
        "max_seqlen_q": max(n for n, _ in lengths),
        "max_seqlen_k": max(m for _, m in lengths),
    }


def make(
    lengths: Lengths,
    dim: int = 24,
    dtype: torch.dtype = FP32,
    *,
    columns: int | None = None,
    heads: int = 2,
    key_heads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys = (sum(n) for n in zip(*lengths, strict=True))
    key_heads = key_heads or heads
    return (
        torch.randn(queries, heads, dim).to(dtype),
        torch.randn(keys, key_heads, dim).to(dtype),
        torch.randn(keys, key_heads, columns or dim).to(dtype),
    )


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, **arguments: Any) -> Tensor:
    """`attention` of each sequence, joined."""
    queries, keys = ([*n] for n in zip(*lengths, strict=True))
    results = [
        attention(*(t.transpose(0, 1)[None] for t in sample), **arguments)[0].transpose(0, 1)
        for sample in zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    ]
    return torch.cat(results)


def assert_each_alone(
    inputs: tuple[Tensor, Tensor, Tensor], lengths: Lengths, **arguments: Any
) -> None:
    """Forward bit by bit. Backward, keys may be cut elsewhere, and parts of dq added in another
    order: a rounding of the largest number."""
    grads = [torch.randn(*inputs[0].shape[:2], inputs[2].shape[-1]).to(inputs[0].dtype)]
    ours = lambda *t: attention_varlen(*t, **places(lengths), **arguments)  # noqa: E731
    alone = lambda *t: one_by_one(*t, lengths, **arguments)  # noqa: E731
    found = forward_and_backward(ours, inputs, grads)
    expected = forward_and_backward(alone, inputs, grads)
    assert torch.equal(found[0], expected[0])
    assert found[0].is_contiguous()
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        bound = (1e-6 if mine.dtype == FP32 else torch.finfo(mine.dtype).eps) * theirs.abs().max()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=float(bound))


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dim", [4, 15, 64, 72])
def test_each_sequence_alone(backend: str, dim: int, is_causal: bool, dtype: torch.dtype) -> None:
    assert_each_alone(make(LENGTHS, dim, dtype), LENGTHS, is_causal=is_causal)


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_that_share_keys_and_another_width(backend: str, dtype: torch.dtype) -> None:
    for key_heads in (1, 2):
        inputs = make(LENGTHS, 16, dtype, columns=9, heads=4, key_heads=key_heads)
        assert_each_alone(inputs, LENGTHS, enable_gqa=True, scale=-0.3)


@every_capability
@pytest.mark.parametrize("lengths", [((450, 1100),), ((1, 1),) * 20, ((40, 30), (40, 30))])
def test_one_long_and_many_short(backend: str, lengths: Lengths) -> None:
    assert_each_alone(make(lengths, 32, BF16), lengths)
    assert_each_alone(make(lengths, 32), lengths, is_causal=True)


@every_capability
def test_against_float64(native_cpu: None) -> None:
    inputs = make(LENGTHS, 40)
    grads = [torch.randn_like(inputs[0])]
    function = lambda *t: attention_varlen(*t, **places(LENGTHS))  # noqa: E731
    found = forward_and_backward(function, inputs, grads)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = ([*n] for n in zip(*LENGTHS, strict=True))
        results = []
        for sample in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
            a, b, c = (t.transpose(0, 1) for t in sample)
            weights = (a @ b.mT / 40**0.5).softmax(-1)
            results.append((weights @ c).transpose(0, 1))
        return torch.cat(results)

    exact = forward_and_backward(formula, [t.double() for t in inputs], [grads[0].double()])
    for mine, true in zip(found, exact, strict=True):
        bound = 4e-6 * float(true.detach().abs().max())
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=bound)


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_logarithm_of_the_denominator(backend: str, dtype: torch.dtype) -> None:
    q, k, v = make(LENGTHS, 16, dtype)
    out, lse = attention_varlen(q, k, v, **places(LENGTHS), return_lse=True)
    assert lse.shape == (2, q.shape[0])
    assert lse.dtype == FP32
    row = key = 0
    for queries, keys in LENGTHS:
        rows, of_keys = slice(row, row + queries), slice(key, key + keys)
        row, key = row + queries, key + keys
        sample = (t.transpose(0, 1)[None] for t in (q[rows], k[of_keys], v[of_keys]))
        assert torch.equal(lse[:, rows], attention(*sample, return_lse=True)[1][0])
        if keys == 0:
            assert (lse[:, rows] == -torch.inf).all()
            assert (out[rows] == 0).all()


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_views_give_what_their_copies_give(native_cpu: None, dtype: torch.dtype) -> None:
    lengths = ((20, 20), (1, 1), (0, 0), (33, 33))
    packed = torch.randn(54, 3, 2, 24).to(dtype)
    columns = torch.randn(2, 24, 54).to(dtype).permute(2, 0, 1)
    grad = torch.randn(2, 54, 24).to(dtype).transpose(0, 1)
    function = lambda *t: attention_varlen(*t, **places(lengths))  # noqa: E731
    q, k, v = packed.unbind(1)
    for inputs in ((q, k, v), (columns, k, v.flip(2))):
        found = forward_and_backward(function, inputs, [grad])
        copies = [t.contiguous() for t in inputs]
        expected = forward_and_backward(function, copies, [grad.contiguous()])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_packed_qkv_is_read_in_place(native_cpu: None) -> None:
    lengths = ((100, 100), (156, 156))
    q, k, v = torch.randn(256, 3, 4, 64).unbind(1)
    arguments = places(lengths)
    with torch.profiler.profile(profile_memory=True) as profile:
        attention_varlen(q, k, v, **arguments)
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.events())
    assert allocated < q.numel() * 4 + 4 * 256 * 4 + 1024


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_any_number_of_threads(
    native_cpu: None, restored_threads: None, dtype: torch.dtype
) -> None:
    lengths = ((300, 1100), (64, 90), (300, 200))
    inputs = make(lengths, 40, dtype, key_heads=1)
    grad = torch.randn_like(inputs[0])
    function = lambda *t: attention_varlen(*t, **places(lengths), enable_gqa=True)  # noqa: E731
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(forward_and_backward(function, inputs, [grad]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("lengths", [((0, 0),), ((4, 0), (2, 0)), ((0, 4), (0, 2))])
def test_nothing_to_attend_to(backend: str, lengths: Lengths) -> None:
    inputs = make(lengths, 8)
    function = lambda *t: attention_varlen(*t, **places(lengths))  # noqa: E731
    results = forward_and_backward(function, inputs, [torch.ones_like(inputs[0])])
    for result, like in zip(results, (inputs[0], *inputs), strict=True):
        assert result.shape == like.shape
        assert (result == 0).all()


def test_no_sequences(backend: str) -> None:
    starts = torch.zeros(1, dtype=torch.int32)
    q = torch.randn(0, 2, 8)
    out = attention_varlen(
        q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=0, max_seqlen_k=0
    )
    assert out.shape == (0, 2, 8)


def test_float64_goes_to_the_reference() -> None:
    lengths = ((3, 4), (0, 2), (2, 0), (1, 3))
    leaves = [t.double().requires_grad_() for t in make(lengths, 4)]
    assert vqkernels.explain("attention_varlen", *leaves).backend == "reference"
    function = lambda *t: attention_varlen(*t, **places(lengths), is_causal=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)


def test_explain_names_the_kernel(native_cpu: None) -> None:
    with vqkernels.use_backend("auto"):
        found = vqkernels.explain("attention_varlen", *make(LENGTHS), **places(LENGTHS))
    assert found.backend == "cpu"


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_takes_its_dtype(backend: str, dtype: torch.dtype) -> None:
    lengths = ((7, 9), (3, 2))
    q, k, v = make(lengths, 16)
    plain = attention_varlen(q.to(dtype), k.to(dtype), v.to(dtype), **places(lengths))
    leaf = q.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = attention_varlen(leaf, k, v, **places(lengths))
    assert torch.equal(out, plain)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad.dtype == FP32


def test_no_second_derivative(backend: str) -> None:
    lengths = ((4, 5), (2, 3))
    q, k, v = (t.requires_grad_() for t in make(lengths, 8))
    out = attention_varlen(q, k, v, **places(lengths))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(backend: str, dynamic: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    def loss(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor:
        out, lse = attention_varlen(q, k, v, **arguments, return_lse=True)
        return out.square().sum() + lse.sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=dynamic)
    for longest in (9, 12) if dynamic else (9, 9):
        lengths = ((longest, 7), (3, longest + 2), (2, 2))
        inputs = [t.requires_grad_() for t in make(lengths, 8)]
        expected = torch.autograd.grad(loss(*inputs, places(lengths)), inputs)
        found = torch.autograd.grad(compiled(*inputs, places(lengths)), inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counter.frame_count == 1


def test_kernels_check_what_compiled_code_cannot(native_cpu: None) -> None:
    torch._dynamo.reset()
    q, k, v = make(((4, 4),), 8)
    compiled = torch.compile(attention_varlen, fullgraph=True, backend="eager")
    starts = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0"):
        compiled(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=5, max_seqlen_k=5)


_LENGTHS = ((3, 4), (2, 1))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"q": torch.zeros(5, 2, 8).long()}, TypeError, "q must be float32"),
        ({"k": torch.zeros(5, 2, 8).half()}, TypeError, "k must have q's dtype"),
        ({"q": torch.zeros(1, 5, 2, 8)}, ValueError, r"q must be \[T, H, d\]"),
        ({"k": torch.zeros(5, 2, 7)}, ValueError, r"k must be \[S, H, 8\]"),
        ({"v": torch.zeros(4, 2, 8)}, ValueError, r"v must be \[5, 2, e\]"),
        (
            {"k": torch.zeros(5, 1, 8), "v": torch.zeros(5, 1, 8)},
            ValueError,
            "k must have q's 2 heads",
        ),
        ({"cu_seqlens_q": torch.tensor([0, 3, 5])}, ValueError, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_k": [0, 4, 5]}, TypeError, "cu_seqlens_k must be a torch.Tensor"),
        ({"cu_seqlens_k": torch.tensor([0, 5]).int()}, ValueError, "must have one shape"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 4]).int()}, ValueError, "rise from 0 to 5"),
        ({"cu_seqlens_k": torch.tensor([0, 6, 5]).int()}, ValueError, "rise from 0 to 5"),
        ({"cu_seqlens_k": torch.tensor([1, 4, 5]).int()}, ValueError, "rise from 0 to 5"),
        ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q must be at least 3, got 2"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 0"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = make(_LENGTHS, 8)
    arguments = {"q": q, "k": k, "v": v, **places(_LENGTHS), **given}
    with pytest.raises(error, match=message):
        attention_varlen(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
