"""What the noise ops share: the key of noise, levels of samples and tokens, results written in
place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqkernels.ops._checks import check_floating, check_same_device, check_tensor


def as_word(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """An int64 scalar with value's bits modulo 2^64."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise TypeError(
                f"{name} must be an int or one int64, got {value.dtype} {list(value.shape)}"
            )
        return value.reshape(()).to(device)
    # Filled on the device: a copy from the host would make it wait, and can't be captured.
    return torch.full((), _wrapped(name, value), dtype=torch.int64, device=device)


def noise_key(
    seed: int | Tensor, step: int | Tensor, stream: int | Tensor, device: torch.device
) -> Tensor:
    """The int64 `[3]` that an op draws its noise by: seed, step, stream."""
    words = (("seed", seed), ("step", step), ("stream", stream))
    if not any(isinstance(value, Tensor) for _, value in words):
        return torch.tensor([_wrapped(*word) for word in words], dtype=torch.int64, device=device)
    return torch.stack([as_word(name, value, device) for name, value in words])


def _wrapped(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or one int64, got {type(value).__name__}")
    return (value + 2**63) % 2**64 - 2**63


def check_sample_ids(sample_ids: Tensor | None, batch: int, device: torch.device) -> None:
    if sample_ids is None:
        return
    check_tensor("sample_ids", sample_ids)
    if sample_ids.dtype != torch.int64 or sample_ids.shape != (batch,):
        raise ValueError(
            f"sample_ids must be int64 [{batch}], got {sample_ids.dtype} {list(sample_ids.shape)}"
        )
    if sample_ids.device != device:
        raise ValueError(f"sample_ids must be on {device}, got {sample_ids.device}")


def check_noise(
    x_name: str,
    x: Tensor,
    noise: Tensor | None,
    seed: int | Tensor | None,
    sample_ids: Tensor | None,
    *,
    optional: bool = False,
) -> None:
    """Noise that was drawn already, or a seed to draw it by: one of them, or none if `optional`."""
    if noise is not None and seed is not None:
        raise ValueError("give noise or seed, got both")
    if noise is None and seed is None and not optional:
        raise ValueError("give noise or seed, got neither")
    if sample_ids is not None and seed is None:
        raise ValueError("sample_ids goes with seed, got no seed")
    check_sample_ids(sample_ids, x.shape[0], x.device)
    if noise is not None:
        check_like("noise", noise, x_name, x)


def check_samples(name: str, x: Tensor) -> None:
    check_floating(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name} must be [B, ...], got a scalar")


def check_like(name: str, value: Tensor, x_name: str, x: Tensor) -> None:
    check_floating(name, value)
    check_same_device(name, value, x_name, x)
    if value.shape != x.shape:
        raise ValueError(
            f"{name} must have {x_name}'s shape {list(x.shape)}, got {list(value.shape)}"
        )


def at_levels(name: str, value: Tensor, x_name: str, x: Tensor) -> Tensor:
    """`value` expanded to the shape of x's first dimensions, as few as it varies over.

    `[B]` stays, `[B, 1, T]` becomes `[B, C, T]` for x `[B, C, T, H, W]`, a scalar `[B]`.
    """
    check_same_device(name, value, x_name, x)
    if value.dim() == 1 and value.shape[0] == x.shape[0]:
        return value.contiguous()
    shape = list(value.shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    if not shape:
        shape = [1]
    if len(shape) > x.dim() or any(
        size != 1 and size != whole for size, whole in zip(shape, x.shape, strict=False)
    ):
        raise ValueError(
            f"{name} must be [{x.shape[0]}], or the first dimensions of {x_name}'s shape "
            f"{list(x.shape)} or ones in their place, got {list(value.shape)}"
        )
    return value.reshape(shape).expand(x.shape[: len(shape)]).contiguous()


def same_levels(x: Tensor, *values: Tensor | None) -> Sequence[Tensor | None]:
    """Levels as `at_levels` gives them, all of the shape of the finest."""
    dims = max(value.dim() for value in values if value is not None)
    if all(value is None or value.dim() == dims for value in values):
        return values
    return [None if value is None else _finer(value, x, dims) for value in values]


def _finer(value: Tensor, x: Tensor, dims: int) -> Tensor:
    ones = (1,) * (dims - value.dim())
    return value.reshape(value.shape + ones).expand(x.shape[:dims]).contiguous()


def check_out(name: str, out: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    check_tensor(name, out)
    if out.shape != tuple(shape) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {dtype} {list(shape)}, got {out.dtype} "
            f"{list(out.shape)}{'' if out.is_contiguous() else ', strided'}"
        )
    if torch.is_grad_enabled() and out.requires_grad:
        raise ValueError(f"{name} must not require a gradient: what is written has none")
