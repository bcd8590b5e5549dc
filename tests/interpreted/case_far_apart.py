"""Index arithmetic beyond 2^31 elements in the Triton kernels."""

from __future__ import annotations

import pytest
import torch
from _helpers.far import CASES, judge_far_apart

from vqkernels import backends, use_backend


@pytest.mark.parametrize("name", list(CASES))
def test_rows_far_apart(name, monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda *_: None)  # tensors are the CPU's here
    with use_backend("triton"):
        judge_far_apart(name, torch.float32)
