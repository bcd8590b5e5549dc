"""Normal noise keyed by what it is for, not by when it was drawn.

Element e of sample s is a function of (seed, s, step, stream, e) alone: Philox4x32-10 with
key = seed and counter = (e / 4, s, step, stream) gives four words; words (0, 1) and (2, 3) give
two normals each by Box-Muller,

    r = sqrt(-2 log((w + 1) / 2^32)),  (r cos(2 pi w' / 2^32), r sin(2 pi w' / 2^32)).

So a sample's noise does not depend on the batch it sits in, on dtype, device or threads.
Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._direct import traced, write
from vqkernels.ops._library import define_writing, fake, not_differentiable
from vqkernels.ops._noise import check_out, check_sample_ids, noise_key
from vqkernels.reference import normal_noise as reference

_normal_noise, _kernels = define_writing(
    "normal_noise(SymInt[] shape, Tensor key, Tensor? sample_ids, ScalarType dtype) -> Tensor",
    reference.normal_noise,
)


@fake(_normal_noise)
def _(
    shape: Sequence[int],
    key: Tensor,
    sample_ids: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return key.new_empty(shape, dtype=dtype)


not_differentiable(_normal_noise, "noise has no gradient")


def normal_noise(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normals `[B, ...]`, reproducible sample by sample.

    Args:
        shape: `[B, ...]`; a sample holds fewer than 2^34 elements.
        seed: an int (modulo 2^64), or an int64 tensor of one element.
        sample_ids: int64 `[B]`, 0..B-1 by default; the low 32 bits count.
        step, stream: ints or int64 tensors of one element; the low 32 bits count.
        dtype: of the result; rounded from fp32.
        device: of the result, by default that of `out` or `sample_ids`, else the CPU.
        out: a contiguous tensor of this shape and dtype to write instead of a new one.

    Returns:
        Noise of the given shape, without a gradient. In fp32 within 2e-6 of the equation.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape or device that does not fit.
    """
    shape = tuple(shape)
    if len(shape) == 0:
        raise ValueError("shape must be [B, ...], got []")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    where = _device(device, out, sample_ids)
    if sample_ids is not None:
        sample_ids = sample_ids.to(where)
    check_sample_ids(sample_ids, shape[0], where)
    key = noise_key(seed, step, stream, where)
    backend = select("normal_noise", key, key.new_empty(0, dtype=dtype))
    arguments = (shape, key, sample_ids, dtype)
    if out is not None:
        check_out("out", out, shape, dtype)
        write(_kernels, arguments, backend, [out])
        return out
    noise: Tensor = (
        _normal_noise(*arguments, backend) if traced() else write(_kernels, arguments, backend, ())
    )
    return noise


def _device(
    device: torch.device | str | None, out: Tensor | None, sample_ids: Tensor | None
) -> torch.device:
    if out is not None:
        if device is not None and torch.device(device).type != out.device.type:
            raise ValueError(f"out must be on {device}, got {out.device}")
        return out.device
    if device is not None:
        return torch.device(device)
    return torch.device("cpu") if sample_ids is None else sample_ids.device
