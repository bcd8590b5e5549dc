"""The packed gradient of the Triton kernels: the bits of the separate ones."""

from __future__ import annotations

import pytest
import torch

from vqkernels.triton import attention, attention_backward, attention_qkvpacked_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_gradient(is_causal, dtype):
    torch.manual_seed(0)
    qkv = torch.randn(2, 21, 3, 2, 24).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out, lse = attention(q, k, v, None, is_causal, 0.3)
    grad = torch.randn(2, 21, 2, 24).to(dtype)
    found = attention_qkvpacked_backward(grad, qkv, out.transpose(1, 2), lse, None, is_causal, 0.3)
    assert found.is_contiguous()
    expected = attention_backward(grad.transpose(1, 2), q, k, v, out, lse, None, is_causal, 0.3)
    for which, true in enumerate(expected):
        assert torch.equal(found[:, :, which].transpose(1, 2), true)
