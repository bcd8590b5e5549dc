"""Checks shared by the ops that apply a per-sample shift, scale or gate to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.ops._checks import check_floating, check_same_device

NORMS = ("layer", "rms")
NO_DOUBLE_BACKWARD = "a second derivative is not implemented"


def contiguous(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A reference's results as kernels lay them out."""
    return tuple(tensor.contiguous() for tensor in tensors)


def check_tokens(name: str, x: Tensor) -> None:
    check_floating(name, x)
    if x.dim() != 3:
        raise ValueError(f"{name} must be [B, N, D], got shape {list(x.shape)}")


def check_same_tokens(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    check_tokens(name, x)
    check_same_device(name, x, other_name, other)
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have {other_name}'s shape {list(other.shape)}, got {list(x.shape)}"
        )


def check_modulation(name: str, vector: Tensor, x_name: str, x: Tensor) -> None:
    """`[B, D]`, or `[B, F, D]` where F divides x's N tokens."""
    check_floating(name, vector)
    check_same_device(name, vector, x_name, x)
    batch, tokens, dim = x.shape
    # Messages are made only to be raised: while compiling, one fixes the sizes that it prints.
    if vector.dim() not in (2, 3) or vector.shape[0] != batch or vector.shape[-1] != dim:
        raise ValueError(f"{_accepted(name, x_name, x)}, got shape {list(vector.shape)}")
    frames = 1 if vector.dim() == 2 else vector.shape[1]
    if frames == 0 or tokens % frames:
        raise ValueError(
            f"{_accepted(name, x_name, x)}, where F divides the {tokens} tokens, got F = {frames}"
        )


def _accepted(name: str, x_name: str, x: Tensor) -> str:
    batch, _, dim = x.shape
    return f"{name} must be [{batch}, {dim}] or [{batch}, F, {dim}] to go with {x_name}"


def check_row(name: str, row: Tensor | None, x: Tensor) -> None:
    if row is None:
        return
    check_floating(name, row)
    check_same_device(name, row, "x", x)
    if row.shape != x.shape[-1:]:
        raise ValueError(f"{name} must be [{x.shape[-1]}], got shape {list(row.shape)}")


def check_weight(name: str, weight: Tensor, rows: int | None, columns: int, x: Tensor) -> None:
    """`[rows, columns]`, as `torch.nn.Linear` has it; any number of rows for None."""
    check_floating(name, weight)
    check_same_device(name, weight, "x", x)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] != columns or rows not in (None, weight.shape[0]):
        wanted = "M" if rows is None else str(rows)
        raise ValueError(f"{name} must be [{wanted}, {columns}], got shape {list(weight.shape)}")


def check_bias(name: str, bias: Tensor | None, weight: Tensor) -> None:
    """`[rows]` of the weight that it goes with."""
    if bias is None:
        return
    check_floating(name, bias)
    check_same_device(name, bias, "its weight", weight)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name} must be [{weight.shape[0]}], got shape {list(bias.shape)}")
