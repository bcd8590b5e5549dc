"""Dropout of attention's weights: which are dropped is a function of the seed and their place."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from _helpers.precision import forward_and_backward
from torch import Tensor

from vqkernels import attention, attention_varlen, backends, use_backend
from vqkernels.reference.attention import dropout_factors

every_capability = pytest.mark.every_capability
pytestmark = pytest.mark.usefixtures("one_thread")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
SEED = 0x9E3779B97F4A7C15  # uses both halves of the key


def as_int64(seed: int) -> Tensor:
    return torch.tensor((seed + 2**63) % 2**64 - 2**63)


def philox(counter: list[int], seed: int) -> list[int]:
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            second >> 32 ^ counter[1] ^ keys[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ counter[3] ^ keys[1],
            first & 0xFFFFFFFF,
        ]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return counter


def factors_of(
    batch: int, heads: int, queries: int, keys: int, p: float, seed: int = SEED, first_head: int = 0
) -> Tensor:
    weights = torch.empty(batch, heads, queries, keys, dtype=torch.float64)
    return dropout_factors(weights, p, as_int64(seed), first_head)


def seen_forward(
    batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype, **arguments: Any
) -> Tensor:
    """Equal weights times the identity: the weights that are kept."""
    q = torch.zeros(batch, heads, queries, 8, dtype=dtype)
    k = torch.zeros(batch, heads, keys, 8, dtype=dtype)
    v = torch.eye(keys, dtype=dtype).expand(batch, heads, keys, keys)
    return attention(q, k, v, **arguments)


def test_a_kernel_without_dropout_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 9, 8)
    with use_backend("reference"):
        expected = attention(q, q, q, dropout_p=0.5, seed=SEED)
    module = importlib.import_module("vqkernels.ops.attention")  # a function goes by this name too
    monkeypatch.setattr(module, "select", lambda *_: "cuda")
    assert torch.equal(attention(q, q, q, dropout_p=0.5, seed=SEED), expected)
    monkeypatch.setattr(backends, "_setting", "cuda")
    with pytest.raises(ValueError, match="'cuda' cannot serve attention: its kernels have no drop"):
        attention(q, q, q, dropout_p=0.5, seed=SEED)


def test_the_formula() -> None:
    """In Python's integers, without the reference's Philox."""
    factors = factors_of(2, 3, 5, 21, 0.3)
    below = round(0.3 * 65536)
    for head in range(6):
        for query in range(5):
            for key in range(21):
                word = philox([key // 8, query, head, 0x6174746E], SEED)[key % 8 // 2]
                number = word >> 16 if key % 2 else word & 0xFFFF
                expected = 0.0 if number < below else 1 / (1 - below / 65536)
                assert float(factors[head // 3, head % 3, query, key]) == expected


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1 / 65536, 0.1, 0.5, 65535 / 65536])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (37, 53), (200, 7), (19, 601), (3, 130)])
def test_the_same_weights_everywhere(
    backend: str, queries: int, keys: int, p: float, dtype: torch.dtype
) -> None:
    kept = factors_of(2, 3, queries, keys, p) != 0
    out = seen_forward(2, 3, queries, keys, dtype, dropout_p=p, seed=SEED)
    assert torch.equal(out != 0, kept)
    # dv of equal weights, for the identity as gradient.
    q, k = torch.zeros(2, 3, queries, 8, dtype=dtype), torch.zeros(2, 3, keys, 8, dtype=dtype)
    v = torch.zeros(2, 3, keys, queries, dtype=dtype, requires_grad=True)
    out = attention(q, k, v, dropout_p=p, seed=SEED)
    (dv,) = torch.autograd.grad(out, v, torch.eye(queries, dtype=dtype).expand_as(out))
    assert torch.equal(dv.mT != 0, kept)


def formula(q: Tensor, k: Tensor, v: Tensor, factors: Tensor, is_causal: bool) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return (scores.softmax(-1) * factors.to(q.dtype)) @ v


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(37, 53), (140, 600)])
def test_against_float64(
    backend: str, queries: int, keys: int, is_causal: bool, dtype: torch.dtype
) -> None:
    """fp32 by rounding, half precision by twice the formula's own error in that dtype."""
    inputs = (
        torch.randn(2, 4, queries, 24).to(dtype),
        torch.randn(2, 2, keys, 24).to(dtype),
        torch.randn(2, 2, keys, 16).to(dtype),
    )
    grads = [torch.randn(2, 4, queries, 16).to(dtype)]
    factors = factors_of(2, 4, queries, keys, 0.4)
    plain = lambda *t: formula(*t, factors, is_causal)  # noqa: E731
    ours = lambda *t: attention(  # noqa: E731
        *t, dropout_p=0.4, seed=SEED, is_causal=is_causal, enable_gqa=True
    )
    found = forward_and_backward(ours, inputs, grads)
    theirs = forward_and_backward(plain, inputs, grads)
    exact = forward_and_backward(plain, [t.double() for t in inputs], [grads[0].double()])
    for mine, their, true in zip(found, theirs, exact, strict=True):
        largest = float(true.detach().abs().max())
        allowed = 2 * float((their.detach().double() - true.detach()).abs().max())
        allowed += torch.finfo(dtype).eps * largest
        if dtype == FP32:
            allowed = max(allowed, 4e-6 * largest)
        assert float((mine.detach().double() - true.detach()).abs().max()) <= allowed


@every_capability
def test_the_logarithm_is_that_of_all_weights(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 3, 40, 16)
    _, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(attention(q, k, v, return_lse=True, dropout_p=0.5, seed=1)[1], lse)


def test_share_of_dropped_weights(backend: str) -> None:
    """Within five deviations; pairs of neighbours, queries and heads are independent."""
    dropped = (seen_forward(2, 2, 256, 256, FP32, dropout_p=0.2, seed=3) == 0).double()
    deviation = (0.2 * 0.8 / dropped.numel()) ** 0.5
    assert abs(float(dropped.mean()) - 0.2) < 5 * deviation
    for dim in range(4):
        both = (dropped * dropped.roll(1, dim)).mean()
        assert abs(float(both) - 0.04) < 5 * (0.04 * 0.96 / dropped.numel()) ** 0.5


@every_capability
def test_same_bits_at_any_number_of_threads(native_cpu: None, restored_threads: None) -> None:
    inputs = torch.randn(3, 1, 2, 450, 40).unbind()
    grad = torch.randn(1, 2, 450, 40)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        function = lambda *t: attention(*t, dropout_p=0.3, seed=5)  # noqa: E731
        results.append(forward_and_backward(function, inputs, [grad]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_seeds(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 3, 20, 8)
    one = attention(q, k, v, dropout_p=0.3, seed=SEED)
    assert torch.equal(attention(q, k, v, dropout_p=0.3, seed=as_int64(SEED)), one)
    assert torch.equal(attention(q, k, v, dropout_p=0.3, seed=SEED - 2**64), one)
    for other in (SEED + 1, SEED ^ 1 << 40):
        assert not torch.equal(attention(q, k, v, dropout_p=0.3, seed=other), one)
    assert torch.equal(attention(q, k, v, seed=SEED), attention(q, k, v))


def test_a_mask_may_learn(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 3, 6, 8)
    bias = torch.randn(6, 6, requires_grad=True)
    fixed = attention(q, k, v, attn_mask=bias.detach(), dropout_p=0.3, seed=SEED)
    out = attention(q, k, v, attn_mask=bias, dropout_p=0.3, seed=SEED)
    torch.testing.assert_close(out, fixed)
    (found,) = torch.autograd.grad(out.square().sum(), bias)
    wide = bias.detach().double().requires_grad_()
    weights = (q.double() @ k.double().mT / 8**0.5 + wide).softmax(-1)
    exact = (weights * factors_of(2, 3, 6, 6, 0.3)) @ v.double()
    (expected,) = torch.autograd.grad(exact.square().sum(), wide)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_compiled_drops_the_same(backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    def loss(q: Tensor, k: Tensor, v: Tensor, seed: Tensor) -> Tensor:
        return attention(q, k, v, dropout_p=0.3, seed=seed).square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    inputs = [t.requires_grad_() for t in torch.randn(3, 2, 3, 12, 8).unbind()]
    for step in range(10):
        seed = torch.tensor(step)
        expected = torch.autograd.grad(loss(*inputs, seed), inputs)
        found = torch.autograd.grad(compiled(*inputs, seed), inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counter.frame_count == 1


@every_capability
@pytest.mark.parametrize("dtype", DTYPES)
def test_varying_lengths_count_their_own(backend: str, dtype: torch.dtype) -> None:
    lengths = ((5, 37), (0, 9), (6, 0), (130, 53))
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths, strict=True)]
    places = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True))
    places |= {"max_seqlen_q": 130, "max_seqlen_k": 53}
    q, k = torch.zeros(141, 2, 8, dtype=dtype), torch.zeros(99, 2, 8, dtype=dtype)
    v = torch.cat([torch.eye(keys, 64, dtype=dtype) for _, keys in lengths])
    v = v[:, None].expand(-1, 2, -1).contiguous().requires_grad_()
    out = attention_varlen(q, k, v, **places, dropout_p=0.3, seed=SEED)
    grad = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, grad)
    for i, (queries, keys) in enumerate(lengths):
        rows = slice(int(starts[0][i]), int(starts[0][i + 1]))
        of_keys = slice(int(starts[1][i]), int(starts[1][i + 1]))
        factors = factors_of(1, 2, queries, keys, 0.3, first_head=2 * i)[0]  # [H, N, M]
        assert torch.equal(out[rows, :, :keys].transpose(0, 1) != 0, factors != 0)
        true = factors.mT / max(1, keys) @ grad[rows].transpose(0, 1).double()
        bound = 4e-6 if dtype == FP32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            dv[of_keys].transpose(0, 1).double(),
            true,
            rtol=0,
            atol=bound * float(true.abs().max()) if true.numel() else 0,
        )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"dropout_p": 0.1}, ValueError, "dropout_p needs a seed"),
        ({"dropout_p": -0.1, "seed": 1}, ValueError, r"dropout_p must be in \[0, 1\)"),
        ({"dropout_p": 1.0, "seed": 1}, ValueError, r"dropout_p must be in \[0, 1\)"),
        ({"dropout_p": float("nan"), "seed": 1}, ValueError, r"dropout_p must be in \[0, 1\)"),
        ({"dropout_p": 0.1, "seed": torch.ones(2).long()}, TypeError, "seed must be an int"),
        ({"dropout_p": 0.1, "seed": torch.ones(())}, TypeError, "seed must be an int"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = torch.randn(3, 1, 1, 4, 8)
    with pytest.raises(error, match=message):
        attention(q, k, v, **given)
