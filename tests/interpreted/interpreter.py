"""Triton's interpreter, mended for the tests.

Triton 3.9 keeps bf16 as raw 16-bit words. Its `tl.dot` multiplies those words as integers, and its
fp32 -> bf16 conversion does not round to nearest even. `mend` replaces both; `case_interpreter.py`
tests the mended ones.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def bf16_to_fp32(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def mend() -> None:
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    original_cast, original_dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16:
            widened = handle(bf16_to_fp32(src.data), tl.float32)
            return widened if target == tl.float32 else original_cast(self, widened, dst_type)
        if target == tl.bfloat16:
            return handle(fp32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return original_cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            handle(bf16_to_fp32(side.data), tl.float32)
            if side.dtype.scalar == tl.bfloat16
            else side
            for side in (a, b)
        )
        return original_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
