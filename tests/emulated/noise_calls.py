"""The emulated launchers of noise on torch tensors of the CPU, with the arguments of the ops."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from cuda_calls import DTYPES, CudaCalls, pointer
from torch import Tensor

TARGETS = ("epsilon", "sample", "v", "flow")
THRESHOLDS = ("none", "clip", "dynamic")
VARIANCE_TYPES = ("learned_range", "learned")


def normal_noise(
    calls: CudaCalls,
    shape: Sequence[int],
    key: Tensor,
    sample_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    out = torch.full(tuple(shape), 7.0, dtype=dtype)
    calls.declare_all(_present(key, sample_ids), [out])
    calls.run(
        calls.library.emulated_normal_noise,
        _sizes(out, 1),
        _samples([out]),
        pointer(key),
        pointer(sample_ids),
    )
    return out


def diffuse(
    calls: CudaCalls,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None = None,
    key: Tensor | None = None,
    sample_ids: Tensor | None = None,
    target: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    results = _room(x0), _room(x0)
    calls.declare_all(_present(x0, alpha, sigma, noise, key, sample_ids), list(results))
    calls.run(
        calls.library.emulated_diffuse,
        _sizes(x0, alpha.dim()),
        _samples([x0, *results, noise]),
        pointer(alpha),
        pointer(sigma),
        pointer(key),
        pointer(sample_ids),
        TARGETS.index(target),
    )
    return results


def denoise_step(
    calls: CudaCalls,
    sample: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor | None = None,
    uncond_output: Tensor | None = None,
    history: Sequence[Tensor] = (),
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    key: Tensor | None = None,
    sample_ids: Tensor | None = None,
    threshold: str = "none",
    ratio: float = 0.995,
    variance_type: str = "learned_range",
    want_prediction: bool = False,
    want_extra: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`out`, one of the given tensors, is written as the next sample."""
    index = torch.tensor(0) if index is None else index
    prediction = _room(sample) if want_prediction else None
    extra = _room(sample) if want_extra else None
    prev = _room(sample) if out is None else out
    given = [sample, model_output, uncond_output, variance, noise]
    tables = (coefficients, index, key, sample_ids)
    written = _present(None if out is not None else prev, prediction, extra)
    calls.declare_all(_present(*given, *history, *tables), written)
    calls.run(
        calls.library.emulated_denoise_step,
        _sizes(sample, index.dim()),
        _samples([*given, prev, prediction, extra, *history]),
        len(history),
        pointer(coefficients),
        ctypes.c_int64(len(coefficients)),
        pointer(index),
        int(index.dim() == 0),
        pointer(key),
        pointer(sample_ids),
        THRESHOLDS.index(threshold),
        ctypes.c_double(ratio),
        VARIANCE_TYPES.index(variance_type),
    )
    return prev, prediction, extra


def box_muller(calls: CudaCalls, words: Tensor) -> Tensor:
    """Of uint32 words as int64 `[N, 2]` the normals `[N, 2]`."""
    narrow = words.to(torch.uint32)
    normals = torch.full(words.shape, torch.nan)
    calls.declare_all([narrow], [normals])
    calls.library.emulated_box_muller(pointer(narrow), ctypes.c_int64(len(words)), pointer(normals))
    return normals


def _room(like: Tensor) -> Tensor:
    """Results, with a value that a kernel which leaves something out does not find."""
    return torch.full(like.shape, 7.0, dtype=like.dtype)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _sizes(x: Tensor, level_dims: int) -> ctypes.Array:
    """B, E and the levels of a sample, which x's first dimensions count."""
    elements = math.prod(x.shape[1:])
    return (ctypes.c_int64 * 3)(x.shape[0], elements, math.prod(x.shape[1 : max(level_dims, 1)]))


def _samples(tensors: list[Tensor | None]) -> ctypes.Array:
    fields = []
    for x in tensors:
        if x is not None:
            assert x[0:1].is_contiguous()
            x = (ctypes.c_int64 * 3)(x.data_ptr(), DTYPES[x.dtype], x.stride(0))
        fields.append(x)
    array = (ctypes.c_void_p * len(fields))(
        *[None if x is None else ctypes.addressof(x) for x in fields]
    )
    array.kept = fields  # what the pointers point to lives as long
    return array
