"""Inputs for VectorQuantize layers of every layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DIM, CODES = 12, 24


def input_for(configuration: dict[str, Any], seed: int) -> Tensor:
    x = torch.randn(3, 40, DIM, generator=torch.Generator().manual_seed(seed))
    if configuration.get("accept_image_fmap"):
        return x.mT.reshape(3, DIM, 8, 5)
    if configuration.get("accept_3d_fmap"):
        return x.mT.reshape(3, DIM, 2, 4, 5)
    return x if configuration.get("channel_last", True) else x.mT
