"""Triton's interpreter, mended and guarded for the tests.

Triton 3.9 keeps bf16 as raw 16-bit words. Its `tl.dot` multiplies those words as integers, and its
fp32 -> bf16 conversion does not round to nearest even. In Triton 3.6 the minimum of a number and a
NaN is the NaN. A BLAS adds the products of equal columns in orders that depend on where they stand,
which no GPU does. `mend` replaces all four. `guard` makes every load, store and atomic check that
it stays within a tensor of its launch. `case_interpreter.py` tests all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
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
    original_cast = builder.cast_impl

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
            bf16_to_fp32(side.data) if side.dtype.scalar == tl.bfloat16 else side.data
            for side in (a, b)
        )
        kind = d.data.dtype
        products = np.einsum("...ik,...kj->...ij", a.astype(kind), b.astype(kind))
        return handle(products + d.data, d.dtype.scalar)

    def create_minnumf(self, left, right):
        return self.binary_op(left, right, np.fmin)

    builder.cast_impl = cast_impl
    builder.create_minnumf = create_minnumf
    builder.create_dot = create_dot


def guard() -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )
    call = executor.__call__
    bounds: list[tuple[int, int]] = []

    def check(pointers, mask) -> None:
        used = np.broadcast_to(mask.data, pointers.data.shape)
        first = pointers.data[used].astype(np.uint64)
        last = first + np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        inside = np.zeros(first.shape, dtype=bool)
        for low, high in bounds:
            inside |= (first >= np.uint64(low)) & (last <= np.uint64(high))
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} accesses outside of the launch's tensors")

    def create_masked_load(self, ptrs, mask, *others):
        check(ptrs, mask)
        return load(self, ptrs, mask, *others)

    def create_masked_store(self, ptrs, value, mask, *others):
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *others)

    def create_atomic_rmw(self, op, ptr, value, mask, *others):
        check(ptr, mask)
        return atomic(self, op, ptr, value, mask, *others)

    def guarded_call(self, *args, **kwargs):
        bounds[:] = {_extent(tensor) for tensor in _tensors(args) if tensor.numel() > 0}
        return call(self, *args, **kwargs)

    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store
    builder.create_atomic_rmw = create_atomic_rmw
    executor.__call__ = guarded_call


def _tensors(args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, tuple):
            yield from _tensors(arg)
        elif isinstance(arg, torch.Tensor):
            yield arg


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor and the one behind its last."""
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
