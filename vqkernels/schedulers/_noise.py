"""Where a step's noise comes from: a tensor, a generator as in diffusers, or a key."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None

# `normal_noise` of stream 0 is for initial samples, stream 1 for the steps; the step is the row.
STEP_STREAM = 1


def draw(like: Tensor, generator: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
    """Normals of like's shape, the ones that diffusers draws from the same generator.

    A list holds one generator a sample. A generator of the CPU draws there, whatever the device.
    """
    generators: Sequence[torch.Generator | None]
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    shape: Sequence[int] = like.shape
    if len(generators) > 1:
        if len(generators) != len(like):
            raise ValueError(
                f"generator must be one or one a sample ({len(like)}), got {len(generators)}"
            )
        shape = [1, *shape[1:]]
    dtype = dtype or like.dtype
    parts = []
    for source in generators:
        device = like.device if source is None else source.device
        parts.append(torch.randn(shape, generator=source, device=device, dtype=dtype))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(like.device)


def check_source(noise: Tensor | None, generator: Generators, seed: int | Tensor | None) -> None:
    given = [
        name
        for name, value in (("variance_noise", noise), ("generator", generator), ("seed", seed))
        if value is not None
    ]
    if len(given) > 1:
        raise ValueError(
            f"give one of variance_noise, generator and seed, got {' and '.join(given)}"
        )
