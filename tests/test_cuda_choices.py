"""`vqkernels.cuda`: what it refuses; what it computes is tested in tests/emulated and tests/gpu."""

from __future__ import annotations

import pytest
import torch

from vqkernels import cuda, native

X, CODES = torch.zeros(3, 8), torch.zeros(5, 8)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"splits": -1}, "splits must be 0 or more, got -1"),
        ({"block_rows": 64}, r"block_rows must be one of \(0, 128, 256\), got 64"),
        ({"stages": 4}, r"stages must be one of \(0, 2, 3\), got 4"),
        ({"metric": "l1"}, "metric must be one of 'l2', 'dot', 'cosine', got 'l1'"),
    ],
)
def test_choices_that_do_not_exist(choices: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cuda.nearest_code(X, CODES, **choices)


def test_peak_of_what_is_not_multiplied() -> None:
    with pytest.raises(ValueError, match=r"torch\.float16 or torch\.bfloat16, got torch\.float32"):
        cuda.tensor_core_peak(dtype=torch.float32)


@pytest.mark.skipif(native.cuda_problem is None, reason="there are CUDA kernels")
def test_without_the_object() -> None:
    assert native.cuda_problem is not None
    for call in (lambda: cuda.nearest_code(X, CODES), cuda.tensor_core_peak):
        with pytest.raises(RuntimeError, match="no CUDA kernels"):
            call()
