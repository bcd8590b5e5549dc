"""Triton kernels, one file an op, and the launchers that the CUDA dispatch key calls.

Importing this package does not import Triton; the first use of a launcher does.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_HOME = {
    "ada_layer_norm": "ada_layer_norm",
    "ada_layer_norm_backward": "ada_layer_norm_backward",
    "attention": "attention",
    "attention_backward": "attention_backward",
    "attention_qkvpacked_backward": "attention_qkvpacked",
    "attention_varlen": "attention_varlen",
    "attention_varlen_backward": "attention_varlen",
    "bias_gelu": "bias_gelu",
    "bias_gelu_backward": "bias_gelu",
    "code_statistics": "code_statistics",
    "denoise_step": "denoise_step",
    "diffuse": "diffuse",
    "diffusion_loss": "diffusion_loss",
    "diffusion_loss_backward": "diffusion_loss",
    "gated_residual": "gated_residual",
    "gated_residual_ada_layer_norm": "gated_residual_ada_layer_norm",
    "gated_residual_ada_layer_norm_backward": "gated_residual_ada_layer_norm",
    "gated_residual_backward": "gated_residual",
    "gather_codes": "gather_codes",
    "nearest_code": "nearest_code",
    "normal_noise": "normal_noise",
    "qk_norm_rope": "qk_norm_rope",
    "qk_norm_rope_backward": "qk_norm_rope_backward",
    "quantize": "quantize",
    "quantize_backward_codebook": "quantize_backward",
    "quantize_backward_x": "quantize_backward",
    "timestep_embedding": "timestep_embedding",
}

__all__ = [
    "ada_layer_norm",
    "ada_layer_norm_backward",
    "attention",
    "attention_backward",
    "attention_qkvpacked_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "bias_gelu",
    "bias_gelu_backward",
    "code_statistics",
    "denoise_step",
    "diffuse",
    "diffusion_loss",
    "diffusion_loss_backward",
    "gated_residual",
    "gated_residual_ada_layer_norm",
    "gated_residual_ada_layer_norm_backward",
    "gated_residual_backward",
    "gather_codes",
    "nearest_code",
    "normal_noise",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "quantize",
    "quantize_backward_codebook",
    "quantize_backward_x",
    "timestep_embedding",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


class _Package(ModuleType):
    """Importing the file `nearest_code.py` would bind its module over the launcher that shares its
    name; the launcher wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOME:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
