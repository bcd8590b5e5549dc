"""Every Triton kernel with every row of its configuration table, as launches on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from modulation_launches import LAUNCHES as _MODULATION
from modulation_launches import ONES as _MODULATION_ONES
from noise_launches import LAUNCHES as _NOISE
from noise_launches import ONES as _NOISE_ONES

from vqkernels.triton import (
    code_statistics,
    gather_codes,
    nearest_code,
    quantize,
    quantize_backward_codebook,
    quantize_backward_x,
)
from vqkernels.triton.configs import TILE_CONFIGS, TileConfig, family

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Enough rows to fill a GPU without splitting K.
ROWS, CODES = 1 << 17, 1 << 14


@dataclass(frozen=True)
class Variant:
    """One launch to compile: the `kernel` that `call` launches on a GPU of this capability."""

    capability: int
    kernel: str
    name: str
    call: Callable[[], Any]
    config: TileConfig | None = None

    def __str__(self) -> str:
        return f"sm_{self.capability}-{self.kernel}-{self.name}"


def variants(capability: int) -> list[Variant]:
    found = [
        Variant(capability, "search_tiles", _name(config), _search(config), config)
        for config in TILE_CONFIGS
        if family(capability) in config.families
    ]
    for kernel, name, call in _MORE.get(capability, ()) + _OTHERS:
        found.append(Variant(capability, kernel, name, call))
    return found


def _name(config: TileConfig) -> str:
    rows = f"-rows{config.rows}" if config.rows else ""
    return f"{config.products}-dim{config.dim or 'any'}{rows}"


def _empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _search(config: TileConfig) -> Callable[[], Any]:
    dtype = FP16 if config.products == "native" else FP32
    dim = config.dim or 512
    x = _empty(config.rows or ROWS, dim, dtype=dtype)
    return lambda: nearest_code(x, _empty(CODES, dim, dtype=dtype), "l2", config=config)


def _nearest(dim: int, metric: str = "l2", dtype: torch.dtype = FP32, **more: Any) -> Any:
    codes = more.pop("codes", _empty(CODES, dim, dtype=dtype))
    x = more.pop("x", _empty(ROWS, dim, dtype=dtype))
    return lambda: nearest_code(x, codes, metric, **more)


def _statistics(weighted: bool, dtype: torch.dtype) -> Any:
    indices = _empty(ROWS, dtype=torch.int64)
    weights = _empty(ROWS) if weighted else None
    return lambda: code_statistics(_empty(ROWS, 64, dtype=dtype), indices, CODES, weights, 0)


def _quantize(masked: bool, dtype: torch.dtype) -> Any:
    mask = _empty(ROWS, dtype=torch.bool) if masked else None
    x, codes = _empty(ROWS, 64, dtype=dtype), _empty(CODES, 64, dtype=dtype)
    return lambda: quantize(x, codes, "l2", mask, "straight_through", None)


def _backward(
    dtype: torch.dtype, passed: bool, committed: bool, gradient: str = "straight_through"
) -> Any:
    x, codes = _empty(ROWS, 64, dtype=dtype), _empty(CODES, 64, dtype=dtype)
    grad = torch.empty_like(x) if passed else None
    loss = _empty() if committed else None
    indices = _empty(ROWS, dtype=torch.int64)
    return lambda: quantize_backward_x(grad, loss, x, codes, indices, gradient)


def _book_gradient(dtype: torch.dtype) -> Any:
    x, codes = _empty(ROWS, 64, dtype=dtype), _empty(CODES, 64, dtype=dtype)
    indices = _empty(ROWS, dtype=torch.int64)
    return lambda: quantize_backward_codebook(_empty(), x, codes, indices)


def _ones(dim: int, dtype: torch.dtype) -> Any:
    return _nearest(dim, x=_empty(1, dim, dtype=dtype), codes=_empty(1, dim))


_ONE_LABEL = _empty(1, dtype=torch.int64)
_ONE_ROW = _empty(1, 1)
_CHANNEL_FIRST = _empty(32, 48, 64, 64, dtype=FP16).permute(0, 2, 3, 1)
_BOOKS = _empty(8, 4, ROWS // 8, 96, dtype=BF16)

# What a row of the table does not show: each once for wgmma, the riskier ones elsewhere.
_COSINE = ("search_tiles", "cosine-bf16", _nearest(64, "cosine", BF16))
_TAIL = ("search_tiles", "dim80-dot", _nearest(80, "dot", FP16))
_SMALL = ("search_tiles", "dim8-fp16", _nearest(8, "l2", FP16))
_SPLITS = ("search_tiles", "splits", _nearest(64, dtype=FP16, splits=4))
_TWO_TERMS = ("search_tiles", "fp16-book-fp32", _nearest(64, x=_empty(ROWS, 64, dtype=FP16)))
_ONE_TERM = ("search_tiles", "bf16-book-fp32", _nearest(64, x=_empty(ROWS, 64, dtype=BF16)))
_STRIDED = (
    "search_tiles",
    "channel-first",
    _nearest(48, x=_CHANNEL_FIRST, codes=_empty(CODES, 48, dtype=FP16)),
)
_SEVERAL = (
    "search_tiles",
    "books",
    _nearest(96, x=_BOOKS, codes=_empty(4, CODES, 96, dtype=BF16)),
)
# An argument of 1 is a constant to Triton and has no type.
_ONES = (
    ("search_tiles", "ones", _ones(17, FP32)),
    ("search_tiles", "ones-bf16", _ones(20, BF16)),
    ("_row_terms", "ones", _ones(17, FP16)),
    ("_code_terms", "ones-planes", _ones(17, FP32)),
    ("search_lanes", "ones", _ones(1, FP32)),
    ("_code_terms", "ones-columns", _ones(1, FP32)),
    ("_gather_codes", "ones", lambda: gather_codes(_ONE_ROW, _ONE_LABEL)),
    ("_keys", "ones", lambda: code_statistics(_ONE_ROW, _ONE_LABEL, 1, None, 0)),
    ("_starts", "ones", lambda: code_statistics(_ONE_ROW, _ONE_LABEL, 1, None, 0)),
    ("_totals", "ones", lambda: code_statistics(_ONE_ROW, _ONE_LABEL, 1, _empty(1), 0)),
    (
        "_totals",
        "ones-residual",
        lambda: quantize_backward_codebook(_empty(), _ONE_ROW, _ONE_ROW, _ONE_LABEL),
    ),
    ("_write_codes", "ones", lambda: quantize(_ONE_ROW, _ONE_ROW, "l2", None, "none", None)),
    ("_close", "ones", lambda: quantize(_ONE_ROW, _ONE_ROW, "l2", None, "none", None)),
    (
        "_grad_x",
        "ones",
        lambda: quantize_backward_x(
            _ONE_ROW, _empty(), _ONE_ROW, _ONE_ROW, _ONE_LABEL, "straight_through"
        ),
    ),
    (
        "_count_found",
        "ones",
        lambda: quantize_backward_x(None, _empty(), _ONE_ROW, _ONE_ROW, _ONE_LABEL, "none"),
    ),
    *_MODULATION_ONES,
    *_NOISE_ONES,
)
_MORE: dict[int, tuple[tuple[str, str, Any], ...]] = {
    80: (_SPLITS, _STRIDED),
    90: (_COSINE, _TAIL, _SMALL, _SPLITS, _TWO_TERMS, _ONE_TERM, _STRIDED, _SEVERAL, *_ONES),
    100: (_TAIL, _TWO_TERMS),
    120: (_COSINE, _SMALL),
}

_OTHERS: tuple[tuple[str, str, Any], ...] = (
    ("search_lanes", "dim3", _nearest(3)),
    ("search_lanes", "dim4-fp16", _nearest(4, dtype=FP16)),
    ("search_lanes", "dim8", _nearest(8)),
    ("search_lanes", "dim16", _nearest(16)),
    ("search_lanes", "splits", _nearest(8, splits=4)),
    ("merge_splits", "fp32", _nearest(8, splits=4)),
    ("_code_terms", "native", _nearest(64, "l2", FP16)),
    ("_code_terms", "native-cosine", _nearest(64, "cosine", BF16)),
    ("_code_terms", "planes", _nearest(64, "cosine")),
    ("_code_terms", "columns", _nearest(8, "cosine")),
    ("_row_terms", "fp16", _nearest(64, x=_empty(ROWS, 64, dtype=FP16))),
    ("_row_terms", "fp32", _nearest(64)),
    (
        "_gather_codes",
        "bf16",
        lambda: gather_codes(_empty(CODES, 64, dtype=BF16), _empty(ROWS, dtype=torch.int64)),
    ),
    ("_keys", "one", _statistics(False, FP32)),
    ("_starts", "one", _statistics(False, FP32)),
    ("_whole_chunks", "fp16", _statistics(False, FP16)),
    ("_whole_chunks", "weighted", _statistics(True, BF16)),
    ("_whole_chunks", "residual", _book_gradient(FP16)),
    ("_totals", "fp16", _statistics(False, FP16)),
    ("_totals", "weighted", _statistics(True, BF16)),
    ("_totals", "residual", _book_gradient(FP16)),
    ("_write_codes", "fp16", _quantize(False, FP16)),
    ("_write_codes", "masked", _quantize(True, FP32)),
    ("_close", "one", _quantize(False, FP32)),
    ("_count_found", "one", _backward(FP32, True, True)),
    ("_rotated_grad_x", "both", _backward(FP16, True, True, "rotation")),
    ("_rotated_grad_x", "passed", _backward(FP32, True, False, "rotation")),
    ("_grad_x", "both", _backward(FP16, True, True)),
    ("_grad_x", "passed", _backward(FP32, True, False)),
    ("_grad_x", "committed", _backward(BF16, False, True)),
    *_MODULATION,
    *_NOISE,
)
