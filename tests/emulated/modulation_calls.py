"""The emulated modulation launchers on torch tensors of the CPU, as differentiable functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from cuda_calls import DTYPES, CudaCalls, pointer
from torch import Tensor

Function = Callable[..., Any]


def norm(calls: CudaCalls, kind: str, eps: float = 1e-6) -> Function:
    """`ada_layer_norm` of x, shift, scale and perhaps weight and bias."""

    def function(x: Tensor, shift: Tensor, scale: Tensor, *affine: Tensor | None) -> Tensor:
        return _Norm.apply(calls, kind, eps, x, shift, scale, *(affine or (None, None)))

    return function


def gate(calls: CudaCalls) -> Function:
    """`gated_residual` of residual, x and gate."""
    return lambda *tensors: _Gate.apply(calls, *tensors)


def fused(calls: CudaCalls, kind: str, eps: float = 1e-6) -> Function:
    """`gated_residual_ada_layer_norm` of residual, x, gate, shift and scale."""
    return lambda *tensors: _Fused.apply(calls, kind, eps, *tensors)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, calls, kind, eps, x, shift, scale, weight, bias):
        out, statistics = _room(x.shape, x), _room((*x.shape[:2], 2))
        _modulate(calls, (x, None, None, out), (None, shift, scale, weight, bias), kind, eps,
                  statistics)  # fmt: skip
        ctx.calls, ctx.kind = calls, kind
        ctx.save_for_backward(x, shift, scale, weight, bias, statistics)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, shift, scale, weight, bias, statistics = ctx.saved_tensors
        grads = [None if t is None else _room(t.shape, t) for t in (x, shift, scale, weight, bias)]
        _modulate_backward(
            ctx.calls,
            (grad, x, grads[0], None, None, None),
            (None, scale, weight, bias),
            ctx.kind,
            statistics,
            (None, *grads[1:]),
        )
        return None, None, None, *grads


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, calls, residual, x, gate):
        out = _room(residual.shape, residual)
        _modulate(calls, (residual, x, out, None), (gate, None, None, None, None))
        ctx.calls = calls
        ctx.save_for_backward(x, gate)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, gate = ctx.saved_tensors
        grads = _room(x.shape, x), _room(gate.shape, gate)
        tokens = (grad, None, None, None, x, grads[0])
        vector_grads = (grads[1], None, None, None, None)
        _modulate_backward(ctx.calls, tokens, (gate, None, None, None), vector_grads=vector_grads)
        return None, grad, *grads


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, calls, kind, eps, residual, x, gate, shift, scale):
        stream, normed = _room(residual.shape, residual), _room(residual.shape, residual)
        statistics = _room((*x.shape[:2], 2))
        _modulate(calls, (residual, x, stream, normed), (gate, shift, scale, None, None), kind, eps,
                  statistics)  # fmt: skip
        ctx.calls, ctx.kind = calls, kind
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(stream, x, gate, shift, scale, statistics)
        return normed, stream

    @staticmethod
    def backward(ctx, grad, passed):
        stream, x, gate, shift, scale, statistics = ctx.saved_tensors
        like = (stream, x, gate, shift, scale)
        grad_residual, grad_x, *grads = (_room(t.shape, t) for t in like)
        _modulate_backward(
            ctx.calls,
            (grad, stream, grad_residual, passed, x, grad_x),
            (gate, scale, None, None),
            ctx.kind,
            statistics,
            (*grads, None, None),
        )
        return None, None, None, grad_residual, grad_x, *grads


def _room(shape: tuple[int, ...], like: Tensor | None = None) -> Tensor:
    """Results, with a value that a kernel which leaves something out does not find."""
    return torch.full(shape, 7.0, dtype=torch.float32 if like is None else like.dtype)


def _modulate(
    calls: CudaCalls,
    tokens: tuple[Tensor | None, ...],
    vectors: tuple[Tensor | None, ...],
    kind: str = "layer",
    eps: float = 0.0,
    statistics: Tensor | None = None,
) -> None:
    """`tokens`: x, branch, stream, out; `vectors`: gate, shift, scale, weight, bias."""
    calls.declare_all(_present(*tokens[:2], *vectors), _present(*tokens[2:], statistics))
    shape = tokens[0].shape
    calls.run(
        calls.library.emulated_modulate,
        _numbers(*shape),
        _fields([_tokens(t) for t in tokens]),
        _fields([_vectors(t, shape[1]) for t in vectors]),
        ctypes.c_double(eps),
        int(kind == "layer"),
        pointer(statistics),
    )


def _modulate_backward(
    calls: CudaCalls,
    tokens: tuple[Tensor | None, ...],
    vectors: tuple[Tensor | None, ...],
    kind: str = "layer",
    statistics: Tensor | None = None,
    vector_grads: tuple[Tensor | None, ...] = (),
) -> None:
    """`tokens`: grad, x, grad_x, passed, branch, grad_branch; `vectors`: gate, scale, weight, bias;
    `vector_grads`: of gate, shift, scale, weight, bias."""
    grad, x, grad_x, passed, branch, grad_branch = tokens
    calls.declare_all(
        _present(grad, x, passed, branch, *vectors, statistics),
        _present(grad_x, grad_branch, *vector_grads),
    )
    batch, length, _ = grad.shape
    each = [None if t is None else length // _frames(t) for t in vector_grads]
    each[3:] = [batch * length] * 2
    calls.run(
        calls.library.emulated_modulate_backward,
        _numbers(*grad.shape),
        _fields([_tokens(t) for t in tokens]),
        _fields([_vectors(t, length) for t in vectors]),
        int(kind == "layer"),
        pointer(statistics),
        _fields([
            None if t is None else _numbers(t.data_ptr(), DTYPES[t.dtype], of)
            for t, of in zip(vector_grads, each, strict=True)
        ]),
    )  # fmt: skip


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _numbers(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def _fields(structs: list[ctypes.Array | None]) -> ctypes.Array:
    pointers = [ctypes.cast(of, ctypes.c_void_p) if of is not None else None for of in structs]
    array = (ctypes.c_void_p * len(structs))(*[None if p is None else p.value for p in pointers])
    array.kept = structs  # what the pointers point to lives as long
    return array


def _stride(tensor: Tensor, dim: int) -> int:
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 0


def _tokens(x: Tensor | None) -> ctypes.Array | None:
    if x is None:
        return None
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    return _numbers(x.data_ptr(), DTYPES[x.dtype], _stride(x, 0), _stride(x, 1))


def _frames(vectors: Tensor) -> int:
    return vectors.shape[1] if vectors.dim() == 3 else 1


def _vectors(vectors: Tensor | None, tokens: int) -> ctypes.Array | None:
    if vectors is None:
        return None
    if vectors.dim() == 1:
        return _numbers(vectors.data_ptr(), DTYPES[vectors.dtype], 0, 0, tokens)
    frame = _stride(vectors, 1) if vectors.dim() == 3 else 0
    each = tokens // _frames(vectors)
    return _numbers(vectors.data_ptr(), DTYPES[vectors.dtype], _stride(vectors, 0), frame, each)
