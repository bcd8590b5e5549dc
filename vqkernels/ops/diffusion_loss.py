"""The training loss of a diffusion or flow model, one number a sample or a token.

    loss = weight * mean(rho(model_output - target))

with the targets of `diffuse` and d = model_output - target in

| loss           | rho(d)                                                                      |
|----------------|-----------------------------------------------------------------------------|
| "mse"          | d^2                                                                         |
| "huber"        | d^2 / 2 for abs(d) <= delta, else delta * (abs(d) - delta / 2)              |
| "pseudo_huber" | 2 delta (sqrt(d^2 + delta^2) - delta), arXiv:2403.16728                     |

The target is made in passing, from noise that is drawn again for the gradient: neither is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_choice
from vqkernels.ops._direct import gradient_of, run
from vqkernels.ops._library import (
    define_with_kernels,
    differentiable,
    fake,
    not_differentiable,
)
from vqkernels.ops._noise import check_like, check_noise, check_samples, noise_key, same_levels
from vqkernels.ops.diffuse import TARGETS, as_level
from vqkernels.reference import diffusion_loss as reference

LOSSES = ("mse", "huber", "pseudo_huber")

_ARGUMENTS = (
    "Tensor model_output, Tensor x0, Tensor alpha, Tensor sigma, Tensor? noise, Tensor? key,"
    " Tensor? sample_ids, Tensor? weight, Tensor? delta, str target, str loss"
)
_diffusion_loss, _kernels = define_with_kernels(
    f"diffusion_loss({_ARGUMENTS}) -> Tensor", reference.diffusion_loss
)


@fake(_diffusion_loss)
def _(
    model_output: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    weight: Tensor | None,
    delta: Tensor | None,
    target: str,
    loss: str,
    backend: str,
) -> Tensor:
    return alpha.new_empty(alpha.shape)


_diffusion_loss_backward, _backward_kernels = define_with_kernels(
    f"diffusion_loss_backward(Tensor grad, {_ARGUMENTS}, bool needs_x0) -> (Tensor, Tensor)",
    reference.diffusion_loss_backward,
)


@fake(_diffusion_loss_backward)
def _(
    grad: Tensor,
    model_output: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: Tensor | None,
    sample_ids: Tensor | None,
    weight: Tensor | None,
    delta: Tensor | None,
    target: str,
    loss: str,
    needs_x0: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_x0 = x0.new_empty(x0.shape if needs_x0 else 0)
    return model_output.new_empty(model_output.shape), grad_x0


not_differentiable(_diffusion_loss_backward, "a second derivative is not implemented")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.target, ctx.loss, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x0 = ctx.needs_input_grad[1]
    arguments = (grad, *ctx.saved_tensors, ctx.target, ctx.loss, needs_x0)
    grad_output, grad_x0 = run(_diffusion_loss_backward, _backward_kernels, arguments, ctx.backend)
    return grad_output, grad_x0 if needs_x0 else None, *(None,) * 10


differentiable(_diffusion_loss, _backward, _save)
_Gradient = gradient_of("DiffusionLoss", _kernels, _backward, _save)


def diffusion_loss(
    model_output: Tensor,
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
    weight: Tensor | None = None,
    loss: str = "mse",
    delta: Tensor | float | None = None,
) -> Tensor:
    """Losses for a model that was given `diffuse(x0, alpha, sigma, ...)` with the same noise.

    Args:
        model_output: what the model predicted, x0's shape, floating point.
        x0: data `[B, ...]`, floating point.
        alpha, sigma: as for `diffuse`: `[B]`, or the first dimensions of x0's shape.
        noise, seed, sample_ids, step, stream: as for `diffuse`, and the same as there.
        target: "epsilon", "sample", "v" or "flow".
        weight: of each level, such as those of `vqkernels.schedulers`; its shape like alpha's.
        loss: "mse", "huber" or "pseudo_huber".
        delta: where the Huber losses turn linear, a number or a level each; not with "mse".

    Returns:
        fp32 losses of alpha's shape, one a level: `.mean()` is what is trained on. Deterministic.
        Gradients go to model_output and x0.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or name that does not fit; neither or both of `noise` and
            `seed`; a gradient asked of alpha, sigma, weight, delta or noise.
    """
    check_samples("x0", x0)
    check_like("model_output", model_output, "x0", x0)
    check_choice("target", target, TARGETS)
    check_choice("loss", loss, LOSSES)
    if (delta is None) != (loss == "mse"):
        raise ValueError(f"delta goes with the Huber losses, got {delta} and loss={loss!r}")
    if delta is not None and not isinstance(delta, Tensor):
        if not delta > 0:
            raise ValueError(f"delta must be positive, got {delta}")
        delta = torch.full((1,), delta, dtype=torch.float32, device=x0.device)
    check_noise("x0", x0, noise, seed, sample_ids)
    given = {"alpha": alpha, "sigma": sigma, "weight": weight, "delta": delta, "noise": noise}
    for name, value in given.items():
        if torch.is_grad_enabled() and value is not None and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: it has none here")
    levels = [
        None if value is None else as_level(name, value, x0)
        for name, value in (*given.items(),)[:4]
    ]
    a, s, w, d = same_levels(x0, *levels)
    key = None if seed is None else noise_key(seed, step, stream, x0.device)
    backend = select("diffusion_loss", model_output, x0, noise)
    arguments = (model_output, x0, a, s, noise, key, sample_ids, w, d, target, loss)
    losses: Tensor = run(_diffusion_loss, _kernels, arguments, backend, gradient=_Gradient)
    return losses
