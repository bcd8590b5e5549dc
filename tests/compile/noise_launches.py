"""The noise kernels as launches on meta tensors: what a sampler and a training step run, and what
costs most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqkernels.triton import (
    denoise_step,
    diffuse,
    diffusion_loss,
    diffusion_loss_backward,
    normal_noise,
)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
LATENTS, TOKENS, RAGGED = (32, 4, 64, 64), (32, 256, 64), (32, 256, 65)
Call = Callable[[], Any]


def _empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_KEY, _IDS = _empty(3, dtype=torch.int64), _empty(32, dtype=torch.int64)


def _noised(
    dtype: torch.dtype, shape: tuple[int, ...] = LATENTS, dims: int = 1, **more: Any
) -> Any:
    """x0, alpha and sigma, and the noise: given, or drawn."""
    levels = _empty(*shape[:dims])
    noise = _empty(*shape, dtype=dtype) if more.get("given") else None
    return _empty(*shape, dtype=dtype), levels, levels, noise, None if more.get("given") else _KEY


def _diffuse(dtype: torch.dtype, target: str, *place: Any, **more: Any) -> Call:
    arguments = _noised(dtype, *place, **more)
    return lambda: diffuse(*arguments, None, target)


def _losses(dtype: torch.dtype, target: str, loss: str, *place: Any, **more: Any) -> Any:
    x0, levels, *rest = _noised(dtype, *place)
    output = _empty(*x0.shape, dtype=more.get("output", dtype))
    return output, x0, levels, *rest, None, levels, None if loss == "mse" else levels, target, loss


def _loss(*of: Any, **more: Any) -> Call:
    arguments = _losses(*of, **more)
    return lambda: diffusion_loss(*arguments)


def _loss_back(*of: Any, needs_x0: bool = False, **more: Any) -> Call:
    arguments = _losses(*of, **more)
    return lambda: diffusion_loss_backward(arguments[2], *arguments, needs_x0)


def _step(
    dtype: torch.dtype,
    shape: tuple[int, ...] = LATENTS,
    dims: int = 0,
    *,
    output: torch.dtype | None = None,
    guided: bool = False,
    history: int = 0,
    drawn: bool = False,
    variance: bool = False,
    threshold: str = "none",
    want: bool = False,
) -> Call:
    sample, predicted = _empty(*shape, dtype=dtype), _empty(*shape, dtype=output or dtype)
    arguments = (
        sample,
        predicted,
        _empty(50, 22),
        _empty(*shape[:dims], dtype=torch.int64),
        predicted if guided else None,
        [sample] * history,
        predicted if variance else None,
        None,
        _KEY if drawn else None,
        None,
    )
    rest = (threshold, 0.995, "learned_range", want, want)
    return lambda: denoise_step(*arguments, *rest)


def _denoise(name: str, *of: Any, **more: Any) -> tuple[str, str, Call]:
    return "_denoise_step", name, _step(*of, **more)


LAUNCHES: tuple[tuple[str, str, Call], ...] = (
    ("_normal_noise", "fp32", lambda: normal_noise(LATENTS, _KEY, None, FP32)),
    ("_normal_noise", "bf16-ids", lambda: normal_noise(LATENTS, _KEY, _IDS, BF16)),
    ("_diffuse", "fp32-v", _diffuse(FP32, "v")),
    ("_diffuse", "bf16-v", _diffuse(BF16, "v")),
    ("_diffuse", "bf16-v-given", _diffuse(BF16, "v", given=True)),
    ("_diffuse", "fp16-flow-tokens", _diffuse(FP16, "flow", TOKENS, 2)),
    ("_diffuse", "bf16-epsilon-ragged", _diffuse(BF16, "epsilon", RAGGED, 2)),
    ("_sum_losses", "fp32-v-mse", _loss(FP32, "v", "mse")),
    ("_sum_losses", "bf16-v-mse", _loss(BF16, "v", "mse")),
    ("_sum_losses", "fp32-bf16-huber", _loss(FP32, "epsilon", "huber", output=BF16)),
    ("_sum_losses", "bf16-flow-tokens", _loss(BF16, "flow", "mse", TOKENS, 2)),
    ("_sum_losses", "bf16-pseudo-ragged", _loss(BF16, "flow", "pseudo_huber", RAGGED, 2)),
    ("_combine_losses", "weighted", _loss(FP32, "v", "mse")),
    ("_loss_backward", "fp32-v-pseudo-x0", _loss_back(FP32, "v", "pseudo_huber", needs_x0=True)),
    ("_loss_backward", "bf16-v-mse", _loss_back(BF16, "v", "mse")),
    ("_loss_backward", "bf16-flow-tokens", _loss_back(BF16, "flow", "mse", TOKENS, 2)),
    _denoise("fp32-ddim", FP32),
    _denoise("bf16-ddim", BF16),
    _denoise("bf16-drawn", BF16, drawn=True),
    _denoise("bf16-guided-drawn", BF16, guided=True, drawn=True, threshold="clip"),
    _denoise("bf16-multistep", BF16, guided=True, history=3, want=True),
    _denoise("fp32-bf16-learned", FP32, output=BF16, guided=True, drawn=True, variance=True),
    _denoise("fp32-dynamic", FP32, dims=1, drawn=True, threshold="dynamic"),
    _denoise("bf16-dynamic-guided", BF16, guided=True, threshold="dynamic"),
    _denoise("bf16-tokens", BF16, TOKENS, 2, drawn=True),
    _denoise("bf16-ragged", BF16, RAGGED, 2, drawn=True),
)
_SCALAR = (1, 1)
# An argument of 1 is a constant to Triton and has no type.
ONES: tuple[tuple[str, str, Call], ...] = (
    ("_normal_noise", "ones", lambda: normal_noise(_SCALAR, _KEY, None, FP32)),
    ("_diffuse", "ones", _diffuse(FP32, "v", _SCALAR, 2)),
    ("_sum_losses", "ones", _loss(FP32, "v", "huber", _SCALAR, 2)),
    ("_loss_backward", "ones", _loss_back(FP32, "v", "huber", _SCALAR, 2)),
    _denoise("ones", FP32, _SCALAR, 2, history=1, drawn=True, variance=True),
    _denoise("ones-dynamic", FP32, _SCALAR, 1, guided=True, threshold="dynamic"),
)
# Kernels of halves that read and write 16 bytes a thread, and how many tensors of each.
WIDE = {
    ("_normal_noise", "bf16-ids"): (0, 1),
    ("_diffuse", "bf16-v"): (1, 2),
    ("_diffuse", "bf16-v-given"): (2, 2),
    ("_sum_losses", "bf16-v-mse"): (2, 0),
    ("_loss_backward", "bf16-v-mse"): (2, 1),
    ("_denoise_step", "bf16-ddim"): (2, 1),
    ("_denoise_step", "bf16-drawn"): (2, 1),
}
