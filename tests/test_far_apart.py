"""Index arithmetic beyond 2^31 elements on the CPU."""

from __future__ import annotations

import pytest
import torch
from _helpers.far import CASES, judge_far_apart


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_far_apart(native_cpu: None, name: str, dtype: torch.dtype) -> None:
    judge_far_apart(name, dtype)
