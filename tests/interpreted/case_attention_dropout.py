"""Dropout of attention's weights in Triton: the reference's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from case_attention import BACKWARD, FORWARD, FP32, make
from case_attention_varlen import LENGTHS, starts_of
from case_attention_varlen import make as make_rows

from vqkernels.reference import attention as reference
from vqkernels.reference import attention_varlen as varlen_reference
from vqkernels.triton import (
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
)

SEED = torch.tensor(0x1E3779B97F4A7C15)


@pytest.mark.parametrize("p", [1 / 65536, 0.5])
def test_the_same_weights(p):
    q, k = torch.zeros(2, 3, 37, 16), torch.zeros(2, 3, 53, 16)
    v = torch.eye(53).expand(2, 3, 53, 53)
    out, lse = attention(q, k, v, None, False, 0.5, p, SEED, config=FORWARD)
    kept = reference.dropout_factors(out.double(), p, SEED) != 0
    assert torch.equal(out != 0, kept)
    v = torch.zeros(2, 3, 53, 37)
    out, grad = torch.zeros(2, 3, 37, 37), torch.eye(37).expand(2, 3, 37, 37)
    arguments = (grad, q, k, v, out, lse, None, False, 0.5, p, SEED)
    assert torch.equal(attention_backward(*arguments, configs=BACKWARD)[2].mT != 0, kept)


@pytest.mark.parametrize("is_causal", [False, True])
def test_against_the_reference(is_causal):
    problem = make(37, 53, 24, heads=4, key_heads=2, batch=2, is_causal=is_causal)
    tensors, more = (problem.q, problem.k, problem.v), (*problem.more, 0.375, SEED)
    theirs = reference.attention_with_lse(*tensors, *more)
    results = attention(*tensors, *more, config=FORWARD)
    torch.testing.assert_close(results, theirs, rtol=0, atol=6e-6)
    grad = torch.ones_like(theirs[0])
    right = reference.attention_backward(grad, *tensors, *theirs, *more)
    found = attention_backward(grad, *tensors, *results, *more, configs=BACKWARD)
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5)


def test_varying_lengths():
    lengths = LENGTHS[:5]
    q, k, v, grad = make_rows(lengths, 24, FP32)
    more = (*starts_of(lengths), 40, 37, False, 0.3, 0.375, SEED)
    theirs = varlen_reference.attention_varlen_with_lse(q, k, v, *more)
    results = attention_varlen(q, k, v, *more, config=FORWARD)
    torch.testing.assert_close(results, theirs, rtol=0, atol=6e-6)
    right = varlen_reference.attention_varlen_backward(grad, q, k, v, *theirs, *more)
    found = attention_varlen_backward(grad, q, k, v, *results, *more, configs=BACKWARD)
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5)
