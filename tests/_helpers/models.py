"""A Diffusion Transformer small enough for a test."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from vqkernels.models.dit import DiT

Model = TypeVar("Model", bound=nn.Module)


def small_dit(**changes: object) -> DiT:
    arguments: dict[str, object] = {
        "input_size": 6, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2,
        "num_heads": 4, "num_classes": 5, "learn_sigma": False, **changes,
    }  # fmt: skip
    return DiT(**arguments)  # type: ignore[arg-type]


def randomized(model: Model, seed: int = 0, scale: float = 0.3) -> Model:
    """Zero-initialized gates hide wrong wiring: give every parameter a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()
