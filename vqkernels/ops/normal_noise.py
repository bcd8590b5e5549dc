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
from vqkernels.reference import normal_noise as reference


def normal_noise(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals `[B, ...]`, reproducible sample by sample.

    Args:
        shape: `[B, ...]`; a sample holds fewer than 2^34 elements.
        seed: an int (modulo 2^64), or an int64 tensor of one element.
        sample_ids: int64 `[B]`, 0..B-1 by default; the low 32 bits count.
        step, stream: ints or int64 tensors of one element; the low 32 bits count.
        dtype: of the result; rounded from fp32.
        device: of the result, by default that of `sample_ids`, else the CPU.

    Returns:
        Noise of the given shape, without a gradient.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape that does not fit.
    """
    shape = tuple(shape)
    if len(shape) == 0:
        raise ValueError("shape must be [B, ...], got []")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    if sample_ids is None:
        sample_ids = torch.arange(shape[0], device=device)
    if sample_ids.dtype != torch.int64 or sample_ids.shape != shape[:1]:
        raise ValueError(
            f"sample_ids must be int64 [{shape[0]}], got {sample_ids.dtype} "
            f"{list(sample_ids.shape)}"
        )
    sample_ids = sample_ids.to(device or sample_ids.device)
    select("normal_noise", sample_ids)
    return reference.normal_noise(
        shape,
        seed=as_word("seed", seed, sample_ids.device),
        sample_ids=sample_ids,
        step=as_word("step", step, sample_ids.device),
        stream=as_word("stream", stream, sample_ids.device),
        dtype=dtype,
    )


def as_word(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """An int64 scalar with value's bits modulo 2^64."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise TypeError(
                f"{name} must be an int or one int64, got {value.dtype} {list(value.shape)}"
            )
        return value.reshape(()).to(device)
    wrapped = (value + 2**63) % 2**64 - 2**63
    return torch.tensor(wrapped, dtype=torch.int64, device=device)
