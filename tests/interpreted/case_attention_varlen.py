"""Attention of varying lengths: every sequence has the bits of `attention` on it alone."""

from __future__ import annotations

import pytest
import torch
from case_attention import BACKWARD, FORWARD
from torch import Tensor

from vqkernels.reference import attention_varlen as reference
from vqkernels.triton import (
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Queries and keys: remainders of tiles, nothing of either, one of each, more queries than keys.
LENGTHS = ((5, 37), (0, 9), (6, 0), (1, 1), (40, 33), (0, 0), (70, 20))


def starts_of(lengths) -> tuple[Tensor, Tensor]:
    queries, keys = zip(*lengths, strict=True)
    return tuple(torch.tensor([0, *n]).cumsum(0).int() for n in (queries, keys))


def make(lengths, dim, dtype=FP32, *, columns=None, heads=2, key_heads=None):
    generator = torch.Generator().manual_seed(dim)
    queries, keys = (int(starts[-1]) for starts in starts_of(lengths))
    key_heads = key_heads or heads
    shapes = ((queries, heads, dim), (keys, key_heads, dim), (keys, key_heads, columns or dim))
    shapes += ((queries, heads, columns or dim),)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def ours(tensors, lengths, is_causal, longer=0):
    q, k, v, grad = tensors
    most = (max(n for n, _ in lengths) + longer, max(m for _, m in lengths) + longer)
    more = (*starts_of(lengths), *most, is_causal, 0.3)
    out, lse = attention_varlen(q, k, v, *more, config=FORWARD)
    grads = attention_varlen_backward(grad, q, k, v, out, lse, *more, configs=BACKWARD)
    return out, lse, *grads


def one_by_one(tensors, lengths, is_causal):
    """`attention` of each sequence, put together."""
    q, k, v, grad = tensors
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=FP32)
    out, dq, dk, dv = (torch.empty_like(t) for t in (grad, q, k, v))
    for rows, keys in reference.sequences_of(*starts_of(lengths)):
        sample = [reference.as_sample(t) for t in (q[rows], k[keys], v[keys])]
        result, logs = attention(*sample, None, is_causal, 0.3, config=FORWARD)
        grads = attention_backward(
            reference.as_sample(grad[rows]),
            *sample,
            result,
            logs,
            None,
            is_causal,
            0.3,
            configs=BACKWARD,
        )
        lse[:, rows] = logs[0]
        places = ((out, rows, result), (dq, rows, grads[0]), (dk, keys, grads[1]))
        for whole, at, part in (*places, (dv, keys, grads[2])):
            whole[at] = part[0].transpose(0, 1)
    return out, lse, dq, dk, dv


def assert_same(results, others):
    for result, other in zip(results, others, strict=True):
        assert torch.equal(result, other)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_each_sequence_alone(is_causal, dtype):
    tensors = make(LENGTHS, 24, dtype)
    assert_same(ours(tensors, LENGTHS, is_causal), one_by_one(tensors, LENGTHS, is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
def test_against_the_reference(is_causal):
    tensors = make(LENGTHS, 40, columns=20, heads=4, key_heads=2)
    q, k, v, grad = tensors
    out, lse, *grads = ours(tensors, LENGTHS, is_causal)
    more = (*starts_of(LENGTHS), 70, 37, is_causal, 0.3)
    theirs = reference.attention_varlen_with_lse(q, k, v, *more)
    torch.testing.assert_close((out, lse), theirs, rtol=0, atol=4e-6)
    right = reference.attention_varlen_backward(grad, q, k, v, *theirs, *more)
    torch.testing.assert_close(tuple(grads), right, rtol=0, atol=1e-5)


def test_without_keys_or_queries():
    lengths = ((6, 0), (0, 5), (3, 4))
    out, lse, dq, dk, dv = ours(make(lengths, 16), lengths, False)
    assert (out[:6] == 0).all()
    assert (lse[:, :6] == -torch.inf).all()
    assert (dq[:6] == 0).all()
    assert (dk[:5] == 0).all()
    assert (dv[:5] == 0).all()
    assert (out[6:] != 0).all()
    for lengths in (((6, 0),), ((0, 6),), ((0, 0), (0, 0))):
        results = ours(make(lengths, 16), lengths, False)
        assert (results[0] == 0).all()
        assert (results[1] == -torch.inf).all()
        assert all((grad == 0).all() for grad in results[2:])


def test_packed_views_and_a_generous_longest():
    lengths = ((20, 20), (1, 1), (33, 33))
    packed = torch.randn(54, 3, 2, 24, generator=torch.Generator().manual_seed(1)).to(FP16)
    q, k, v = packed.unbind(1)
    grad = torch.ones_like(q)
    copies = tuple(t.contiguous() for t in (q, k, v, grad))
    expected = ours(copies, lengths, True)
    assert_same(ours((q, k, v, grad), lengths, True, longer=40), expected)


def test_wrong_starts_stay_inside():
    """What lies beside the tensors is neither read nor written, whatever the starts say."""
    memory = torch.full((3, 60, 2, 16), torch.nan)
    q, k, v = (t[20:40] for t in memory)
    memory[:, 20:40] = torch.randn(3, 20, 2, 16)
    starts = torch.tensor([-5, 7, 3, 90], dtype=torch.int32)
    more = (starts, starts, 90, 90, False, 0.3)
    out, lse = attention_varlen(q, k, v, *more, config=FORWARD)
    grads = attention_varlen_backward(q, q, k, v, out, lse, *more, configs=BACKWARD)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    assert memory[:, :20].isnan().all()
    assert memory[:, 40:].isnan().all()
