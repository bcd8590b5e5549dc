"""Argument checks shared by the public functions: name, what was given, what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("l2", "dot", "cosine")
_HALVES = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_floating(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")


def check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        options = ", ".join(repr(option) for option in accepted)
        raise ValueError(f"{name} must be one of {options}, got {value!r}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on one device, got {value.device} and {other.device}"
        )


def check_codebook(codebook: Tensor) -> None:
    check_floating("codebook", codebook)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must be [K, D] or [G, K, D], got shape {_shape(codebook)}")
    if codebook.numel() == 0:
        raise ValueError(f"codebook must hold at least one code, got shape {_shape(codebook)}")
    if codebook.shape[-2] >= 1 << 31:
        raise ValueError(f"codebook must hold fewer than 2^31 codes, got {codebook.shape[-2]}")


def check_rows(name: str, x: Tensor, codebook: Tensor) -> None:
    """x `[..., N, D]` goes with a book `[K, D]`, `[..., G, N, D]` with `[G, K, D]`."""
    check_floating(name, x)
    check_codebook(codebook)
    if codebook.dim() == 2:
        if x.dim() < 2:
            raise ValueError(
                f"{name} must be [..., N, D] with a codebook [K, D], got shape {_shape(x)}"
            )
    elif x.dim() < 3 or x.shape[-3] != codebook.shape[0]:
        raise ValueError(
            f"{name} must be [..., G, N, D] with a codebook [G, K, D], "
            f"got {name} {_shape(x)} and codebook {_shape(codebook)}"
        )
    if x.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"{name} and codebook must agree in their last dimension D, "
            f"got {name} {_shape(x)} and codebook {_shape(codebook)}"
        )
    if x.dtype != codebook.dtype and not (x.dtype in _HALVES and codebook.dtype == torch.float32):
        raise TypeError(
            f"{name} and codebook must have one dtype, or a half-precision {name} with a float32 "
            f"codebook, got {x.dtype} and {codebook.dtype}"
        )
    check_same_device(name, x, "codebook", codebook)


def check_labels(
    name: str, labels: Tensor, shape: torch.Size, dtypes: tuple[torch.dtype, ...]
) -> None:
    check_tensor(name, labels)
    if labels.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {_shape(labels)}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
