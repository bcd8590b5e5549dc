"""Forward noising and the training target that goes with it, in one step.

    x_t = alpha * x0 + sigma * noise

| target    | value                      | what the model learns to predict              |
|-----------|----------------------------|-----------------------------------------------|
| "epsilon" | noise                      | the noise, arXiv:2006.11239                   |
| "sample"  | x0                         | the data                                      |
| "v"       | alpha * noise - sigma * x0 | v-prediction, arXiv:2202.00512                |
| "flow"    | noise - x0                 | rectified flow's velocity, d x_t / d t where  |
|           |                            | alpha = 1 - t and sigma = t, arXiv:2209.03003 |

Noise given by a seed is drawn in passing and drawn again for a gradient: it is never stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_choice, check_floating
from vqkernels.ops._direct import gradient_of, run, write
from vqkernels.ops._library import (
    define_as,
    define_writing,
    differentiable,
    fake,
    not_differentiable,
)
from vqkernels.ops._noise import (
    at_levels,
    check_noise,
    check_out,
    check_samples,
    noise_key,
    same_levels,
)
from vqkernels.ops.normal_noise import _normal_noise
from vqkernels.reference import diffuse as reference

TARGETS = ("epsilon", "sample", "v", "flow")

_ARGUMENTS = (
    "Tensor x0, Tensor alpha, Tensor sigma, Tensor? noise, Tensor? key, Tensor? sample_ids,"
    " str target"
)
_diffuse, _kernels = define_writing(f"diffuse({_ARGUMENTS}) -> (Tensor, Tensor)", reference.diffuse)


@fake(_diffuse)
def _(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    target: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape)


def _run_backward(
    grad_x_t: Tensor,
    grad_target: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    target: str,
    backend: str,
) -> tuple[Tensor, ...]:
    z = noise
    if z is None:
        z = _normal_noise(x0.shape, key, sample_ids, torch.float32, backend)
    grads = reference.diffuse_backward(
        grad_x_t, grad_target, x0, alpha, sigma, z, None, None, target
    )
    return *grads[:3], grads[3] if noise is not None else x0.new_empty(0)


_diffuse_backward = define_as(
    f"diffuse_backward(Tensor grad_x_t, Tensor grad_target, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
)


@fake(_diffuse_backward)
def _(
    grad_x_t: Tensor,
    grad_target: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    target: str,
    backend: str,
) -> tuple[Tensor, ...]:
    of_noise = x0.new_empty(0) if noise is None else noise.new_empty(noise.shape)
    return x0.new_empty(x0.shape), torch.empty_like(alpha), torch.empty_like(sigma), of_noise


not_differentiable(_diffuse_backward, "a second derivative is not implemented")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.target, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_x_t: Tensor, grad_target: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = _diffuse_backward(grad_x_t, grad_target, *tensors, ctx.target, ctx.backend)
    return *grads[:3], None if tensors[3] is None else grads[3], None, None, None, None


differentiable(_diffuse, _backward, _save)
_Gradient = gradient_of("Diffuse", _kernels, _backward, _save, [])


def diffuse(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    step: int | Tensor = 0,
    stream: int | Tensor = 0,
    target: str = "epsilon",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`(x_t, target)` for a batch of samples, each (or each token) at its own noise level.

    Args:
        x0: data `[B, ...]`, floating point.
        alpha, sigma: the weights of data and noise, `[B]`; or the first dimensions of x0's shape,
            such as `[B, N]` for tokens `[B, N, D]`, with ones where they do not vary. Kept in fp32.
        noise: x0's shape; give this or `seed`.
        seed, sample_ids, step, stream: draw the noise as `normal_noise(x0.shape, ...)` does.
        target: "epsilon", "sample", "v" or "flow".
        out: two contiguous tensors of x0's shape and dtype to write instead of new ones; there is
            no gradient then.

    Returns:
        Two tensors of x0's shape and dtype, computed in fp32. Gradients go to x0, alpha, sigma and
        a given noise.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or `target` that does not fit; neither or both of `noise` and
            `seed`.
    """
    check_samples("x0", x0)
    levels = [as_level(name, value, x0) for name, value in (("alpha", alpha), ("sigma", sigma))]
    weights = same_levels(x0, *levels)
    check_choice("target", target, TARGETS)
    check_noise("x0", x0, noise, seed, sample_ids)
    key = None if seed is None else noise_key(seed, step, stream, x0.device)
    backend = select("diffuse", x0, noise)
    arguments = (x0, *weights, noise, key, sample_ids, target)
    if out is not None:
        for name, tensor in zip(("out[0]", "out[1]"), out, strict=True):
            check_out(name, tensor, x0.shape, x0.dtype)
        write(_kernels, arguments, backend, out)
        return out
    x_t, wanted = run(_diffuse, _kernels, arguments, backend, [], gradient=_Gradient)
    return x_t, wanted


def as_level(name: str, value: Tensor, x0: Tensor) -> Tensor:
    """A floating-point level, in fp32 or float64."""
    check_floating(name, value)
    at = at_levels(name, value, "x0", x0)
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    return at if at.dtype == wide else at.to(wide)
