"""Normalized queries and keys, turned by their positions.

    y = norm(x) * weight
    out = (a cos - b sin, b cos + a sin)    for each pair (a, b) of columns of y

`norm` is RMSNorm or LayerNorm over the head's columns (Henry et al. 2020, arXiv:2010.04245;
Dehghani et al. 2023, arXiv:2302.05442), the rotation that of Su et al. 2021, arXiv:2104.09864.
Pairs are columns (i, i + d / 2), as in GPT-NeoX and Llama, or (2 i, 2 i + 1) where interleaved, as
in RoFormer and FLUX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_choice, check_floating, check_same_device
from vqkernels.ops._library import define, differentiable, fake, not_differentiable
from vqkernels.ops._modulation import NO_DOUBLE_BACKWARD, contiguous
from vqkernels.reference import qk_norm_rope as reference

NORMS = ("rms", "layer", "none")


def _reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    results = reference.qk_norm_rope(
        q,
        k,
        q_weight=q_weight,
        k_weight=k_weight,
        cos=cos,
        sin=sin,
        eps=eps,
        norm=norm,
        interleaved=interleaved,
    )
    # What is neither normalized nor turned must not be the argument itself.
    return contiguous((results[0].clone(), results[1].clone()))


_qk_norm_rope = define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin,"
    " float eps, str norm, bool interleaved) -> (Tensor, Tensor)",
    _reference,
)


@fake(_qk_norm_rope)
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_qk_norm_rope_backward = define(
    "qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor? q_weight,"
    " Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, str norm, bool interleaved)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *arguments: contiguous(
        tuple(grad.clone() for grad in reference.qk_norm_rope_backward(*arguments))
    ),
)


@fake(_qk_norm_rope_backward)
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    like = (q, k, q_weight, k_weight)
    return tuple(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in like)


not_differentiable(_qk_norm_rope_backward, NO_DOUBLE_BACKWARD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.norm, ctx.interleaved, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = _qk_norm_rope_backward(
        grad_q, grad_k, *tensors, ctx.eps, ctx.norm, ctx.interleaved, ctx.backend
    )
    found = (g if t is not None else None for t, g in zip(tensors[:4], grads, strict=True))
    return *found, None, None, None, None, None, None


differentiable(_qk_norm_rope, _backward, _save)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalize each head's rows of q and k, then turn them by their positions; all in fp32.

    Args:
        q, k: `[B, H, N, d]` and `[B, Hk, N, d]`, floating point, any strides, such as views of a
            packed qkv.
        q_weight, k_weight: `[d]`, or None for ones.
        cos, sin: `[N, d / 2]` or `[B, N, d / 2]`, as `rope_tables` makes them, without a gradient;
            None for no rotation.
        eps: added to the mean square (to the variance under "layer").
        norm: "rms", "layer", or "none" for the rotation alone.
        interleaved: pairs are columns (2 i, 2 i + 1) instead of (i, i + d / 2).

    Returns:
        q and k, in their shapes and dtypes, also under autocast. Gradients are deterministic.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or `norm` that does not fit, an odd d with a rotation, a table
            without the other or one that requires a gradient.
    """
    _check_heads("q", q)
    _check_heads("k", k)
    check_same_device("k", k, "q", q)
    if k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(
            f"k must be [B, Hk, N, d] with q's B, N and d, got {list(k.shape)} and q of shape "
            f"{list(q.shape)}"
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_floating(name, weight)
            check_same_device(name, weight, "q", q)
            if weight.shape != q.shape[-1:]:
                raise ValueError(f"{name} must be [{q.shape[-1]}], got shape {list(weight.shape)}")
    _check_tables(cos, sin, q)
    check_choice("norm", norm, NORMS)
    backend = select("qk_norm_rope", q, k, q_weight, k_weight, cos, sin)
    out: tuple[Tensor, Tensor] = _qk_norm_rope(
        q, k, q_weight, k_weight, cos, sin, eps, norm, interleaved, backend
    )
    return out


def _check_heads(name: str, x: Tensor) -> None:
    check_floating(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B, H, N, d], got shape {list(x.shape)}")


def _check_tables(cos: Tensor | None, sin: Tensor | None, q: Tensor) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("cos and sin must be given together")
    batch, _, tokens, dim = q.shape
    if dim % 2:
        raise ValueError(f"q must have an even d to be rotated, got {dim}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_floating(name, table)
        check_same_device(name, table, "q", q)
        if table.shape not in ((tokens, dim // 2), (batch, tokens, dim // 2)):
            raise ValueError(
                f"{name} must be [{tokens}, {dim // 2}] or [{batch}, {tokens}, {dim // 2}], "
                f"got shape {list(table.shape)}"
            )
        if table.requires_grad:
            raise ValueError(f"{name} must not require a gradient; there is none for the tables")
    if cos.shape != sin.shape:
        raise ValueError(f"sin must have cos' shape {list(cos.shape)}, got shape {list(sin.shape)}")


def rope_tables(
    grid: Sequence[int],
    dim: int,
    *,
    theta: float = 10000.0,
    axes_dim: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the positions on a grid of one (text), two (images) or three (video) axes.

        angle[n, i] = position of token n on i's axis * theta^(-2 j / axis' columns)

    where i is the axis' pair j. Tokens are in row-major order. Source: arXiv:2104.09864; several
    axes as in FLUX.

    Args:
        grid: sizes of the axes, such as `(height, width)`.
        dim: columns of a head, even.
        theta: base of the frequencies.
        axes_dim: columns of each axis, even, together `dim`; an equal share of the pairs if None,
            first axes first.
        device: of the tables.

    Returns:
        two float32 `[prod(grid), dim / 2]`, rounded from float64.

    Raises:
        ValueError: an odd width, or widths that do not fit.
    """
    if not 1 <= len(grid) <= 3 or min(grid) < 0:
        raise ValueError(f"grid must be the sizes of one to three axes, got {tuple(grid)}")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, got {dim}")
    if axes_dim is not None:
        even = all(width >= 0 and width % 2 == 0 for width in axes_dim)
        if len(axes_dim) != len(grid) or sum(axes_dim) != dim or not even:
            raise ValueError(
                f"axes_dim must be {len(grid)} even widths that add up to {dim}, "
                f"got {tuple(axes_dim)}"
            )
    if not (theta > 0 and math.isfinite(theta)):
        raise ValueError(f"theta must be positive and finite, got {theta}")
    return reference.rope_tables(grid, dim, theta=theta, axes_dim=axes_dim, device=device)
