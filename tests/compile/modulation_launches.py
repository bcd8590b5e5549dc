"""The modulation kernels with every row of their table, as launches on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqkernels.triton import (
    ada_layer_norm,
    ada_layer_norm_backward,
    bias_gelu,
    bias_gelu_backward,
    gated_residual,
    gated_residual_ada_layer_norm,
    gated_residual_ada_layer_norm_backward,
    gated_residual_backward,
    qk_norm_rope,
    qk_norm_rope_backward,
    timestep_embedding,
)
from vqkernels.triton.modulation_rows import vector_of
from vqkernels.triton.modulation_sums import add_up

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
BATCH, TOKENS = 64, 256
Call = Callable[[], Any]


def _empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Inputs:
    """Tokens, chunks of one linear layer's result, weight and bias, statistics."""

    def __init__(self, dim: int, dtype: torch.dtype, tokens: int = TOKENS, frames: int = 0) -> None:
        self.x = _empty(BATCH, tokens, dim, dtype=dtype)
        lead = (BATCH, frames) if frames else (BATCH,)
        self.shift, self.scale, self.gate, *_ = _empty(*lead, 6 * dim, dtype=dtype).chunk(6, -1)
        self.row = _empty(dim, dtype=dtype)
        self.statistics = _empty(BATCH, tokens, 2)

    def norm(self, affine: bool = False, norm: str = "layer") -> Call:
        more = (self.row, self.row) if affine else (None, None)
        return lambda: ada_layer_norm(self.x, self.shift, self.scale, *more, 1e-6, norm)

    def fused(self) -> Call:
        vectors = (self.gate, self.shift, self.scale)
        return lambda: gated_residual_ada_layer_norm(self.x, self.x, *vectors, 1e-6, "layer")

    def norm_backward(self, affine: bool = False, norm: str = "layer") -> Call:
        more = (self.row, self.row) if affine else (None, None)
        vectors = (self.shift, self.scale, *more, self.statistics)
        return lambda: ada_layer_norm_backward(self.x, self.x, *vectors, norm)

    def fused_backward(self, passed: bool = True) -> Call:
        grads = (self.x, self.x if passed else None)
        rest = (self.x, self.x, self.gate, self.shift, self.scale, self.statistics, "layer")
        return lambda: gated_residual_ada_layer_norm_backward(*grads, *rest)

    def gated(self) -> Call:
        return lambda: gated_residual(self.x, self.x, self.gate)

    def gated_backward(self) -> Call:
        return lambda: gated_residual_backward(self.x, self.x, self.gate)

    def gelu(self, approximate: str, biased: bool = True) -> Call:
        return lambda: bias_gelu(self.x, self.row if biased else None, approximate)

    def gelu_backward(self, approximate: str, biased: bool = True) -> Call:
        bias = self.row if biased else None
        return lambda: bias_gelu_backward(self.x, self.x, bias, approximate)


def _of_width(dim: int, dtype: torch.dtype) -> tuple[tuple[str, str, Call], ...]:
    """The norm and its gradients, plain and gated."""
    inputs = _Inputs(dim, dtype)
    name = f"{'fp32' if dtype == FP32 else 'bf16'}-dim{dim}"
    found = (
        ("_normalize", name, inputs.norm()),
        ("_normalize_backward", name, inputs.norm_backward()),
        ("_normalize_backward", f"{name}-gated", inputs.fused_backward()),
    )
    # Rows that are not held whole take `gated_residual` first.
    return found if dim > 8192 else (*found, ("_normalize", f"{name}-gated", inputs.fused()))


def _turned(dim: int, dtype: torch.dtype, interleaved: bool, norm: str = "rms") -> Call:
    """q and k of a packed qkv."""
    q, k, _ = _empty(8, 1024, 3, 16, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    row, table = _empty(dim, dtype=dtype), _empty(1024, dim // 2)
    return lambda: qk_norm_rope(q, k, row, row, table, table, 1e-6, norm, interleaved)


def _turned_back(dim: int, dtype: torch.dtype, interleaved: bool, norm: str = "rms") -> Call:
    q, k, _ = _empty(8, 1024, 3, 16, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    row, table = _empty(dim, dtype=dtype), _empty(1024, dim // 2)
    rest = (row, row, table, table, 1e-6, norm, interleaved)
    return lambda: qk_norm_rope_backward(q, k, q, k, *rest)


_WIDE, _HALF, _SINGLE = _Inputs(16384, BF16), _Inputs(1152, FP16), _Inputs(1152, FP32)
_FRAMES = _Inputs(1152, BF16, frames=TOKENS)
_RAGGED = _Inputs(70, BF16, tokens=37)
_GELU = _Inputs(4608, BF16)
_SUMS, _ROW = _empty(4 * BATCH, 1152), _empty(1152, dtype=FP16)
_SAMPLES = _empty(BATCH, 1152, dtype=FP16)
_SCALES = vector_of(_HALF.scale, TOKENS)

LAUNCHES: tuple[tuple[str, str, Call], ...] = (
    *(one for dim in (384, 1024, 1152, 3072, 8192, 16384) for one in _of_width(dim, BF16)),
    *_of_width(1152, FP32),
    *_of_width(4096, FP32),
    ("_normalize", "fp16-affine", _HALF.norm(affine=True)),
    ("_normalize", "bf16-rms", _Inputs(1152, BF16).norm(norm="rms")),
    ("_normalize", "bf16-frames", _FRAMES.norm()),
    ("_normalize", "bf16-ragged", _RAGGED.fused()),
    ("_normalize_backward", "fp16-affine", _HALF.norm_backward(affine=True)),
    ("_normalize_backward", "bf16-rms", _Inputs(1152, BF16).norm_backward(norm="rms")),
    ("_normalize_backward", "bf16-frames", _FRAMES.norm_backward()),
    ("_normalize_backward", "bf16-ragged", _RAGGED.fused_backward(passed=False)),
    ("_row_statistics", "bf16", _WIDE.norm()),
    ("_sums_along_rows", "bf16", _WIDE.norm_backward()),
    ("_add_all", "bf16-gated", _Inputs(1152, BF16).fused_backward()),
    ("_add_all", "fp32", _SINGLE.norm_backward()),
    ("_add_up", "plain", lambda: add_up(_SUMS, _empty(BATCH, 1152, dtype=BF16))),
    ("_add_up", "affine", lambda: add_up(_SUMS, _SAMPLES, affine=(_ROW, _ROW, _SUMS))),
    ("_add_up", "scaled", lambda: add_up(_SUMS, _ROW, scale=(_SCALES, (4, 4, TOKENS)))),
    ("_gated_residual", "bf16-dim1152", _Inputs(1152, BF16).gated()),
    ("_gated_residual", "bf16-dim384", _Inputs(384, BF16).gated()),
    ("_gated_residual", "bf16-dim3072", _Inputs(3072, BF16).gated()),
    ("_gated_residual", "fp32-dim1152", _SINGLE.gated()),
    ("_gated_residual_backward", "bf16-dim1152", _Inputs(1152, BF16).gated_backward()),
    ("_gated_residual_backward", "bf16-dim384", _Inputs(384, BF16).gated_backward()),
    ("_gated_residual_backward", "bf16-dim3072", _Inputs(3072, BF16).gated_backward()),
    ("_gated_residual_backward", "fp32-dim1152", _SINGLE.gated_backward()),
    ("_bias_gelu", "bf16-tanh", _GELU.gelu("tanh")),
    ("_bias_gelu", "bf16-none", _GELU.gelu("none")),
    ("_bias_gelu", "fp32-tanh", _Inputs(4608, FP32).gelu("tanh", biased=False)),
    ("_bias_gelu_backward", "bf16-tanh", _GELU.gelu_backward("tanh")),
    ("_bias_gelu_backward", "bf16-none", _GELU.gelu_backward("none")),
    ("_bias_gelu_backward", "fp32-tanh", _Inputs(4608, FP32).gelu_backward("tanh", biased=False)),
    ("_qk_norm_rope", "bf16-dim64-half-split", _turned(64, BF16, False)),
    ("_qk_norm_rope", "bf16-dim72-interleaved", _turned(72, BF16, True)),
    ("_qk_norm_rope", "bf16-dim128-interleaved", _turned(128, BF16, True)),
    ("_qk_norm_rope", "fp32-dim72-layer", _turned(72, FP32, False, "layer")),
    ("_qk_norm_rope_backward", "bf16-dim64-half-split", _turned_back(64, BF16, False)),
    ("_qk_norm_rope_backward", "bf16-dim72-interleaved", _turned_back(72, BF16, True)),
    ("_qk_norm_rope_backward", "bf16-dim128-interleaved", _turned_back(128, BF16, True)),
    ("_qk_norm_rope_backward", "fp32-dim72-layer", _turned_back(72, FP32, False, "layer")),
    ("_timestep_embedding", "fp32", lambda: timestep_embedding(_empty(256), 256, 1e4)),
)
_ONE = _Inputs(1, FP32, tokens=1)
_HEAD, _COLUMN = _empty(1, 1, 1, 1), _empty(1)
_HEADS = (_HEAD, _HEAD, _COLUMN, _COLUMN, None, None, 1e-6, "layer", False)
# An argument of 1 is a constant to Triton and has no type.
ONES: tuple[tuple[str, str, Call], ...] = (
    ("_normalize", "ones", _ONE.norm(affine=True)),
    ("_normalize_backward", "ones", _ONE.norm_backward(affine=True)),
    ("_add_all", "ones", _ONE.norm_backward(affine=True)),
    ("_add_up", "ones", _ONE.norm_backward(affine=True)),
    ("_gated_residual_backward", "ones", _ONE.gated_backward()),
    ("_bias_gelu_backward", "ones", _ONE.gelu_backward("none")),
    ("_qk_norm_rope", "ones", lambda: qk_norm_rope(*_HEADS)),
    ("_qk_norm_rope_backward", "ones", lambda: qk_norm_rope_backward(_HEAD, _HEAD, *_HEADS)),
    ("_timestep_embedding", "ones", lambda: timestep_embedding(_empty(1), 1, 1e4)),
)
