"""Fast building blocks for vector quantizers and Diffusion Transformers."""

from vqkernels import native
from vqkernels.backends import explain, use_backend
from vqkernels.ops import (
    DenoiseStepOutput,
    QuantizeOutput,
    ada_layer_norm,
    attention,
    attention_qkvpacked,
    attention_varlen,
    bias_gelu,
    code_statistics,
    denoise_coefficients,
    denoise_step,
    diffuse,
    diffusion_loss,
    ema_update,
    gated_residual,
    gated_residual_ada_layer_norm,
    gather_codes,
    modulated_attention,
    modulated_mlp,
    nearest_code,
    normal_noise,
    pack_codebook,
    qk_norm_rope,
    quantize,
    rope_tables,
    timestep_embedding,
)

native.load()

__version__ = "0.1.0"

__all__ = [
    "DenoiseStepOutput",
    "QuantizeOutput",
    "ada_layer_norm",
    "attention",
    "attention_qkvpacked",
    "attention_varlen",
    "bias_gelu",
    "code_statistics",
    "denoise_coefficients",
    "denoise_step",
    "diffuse",
    "diffusion_loss",
    "ema_update",
    "explain",
    "gated_residual",
    "gated_residual_ada_layer_norm",
    "gather_codes",
    "modulated_attention",
    "modulated_mlp",
    "nearest_code",
    "normal_noise",
    "pack_codebook",
    "qk_norm_rope",
    "quantize",
    "rope_tables",
    "timestep_embedding",
    "use_backend",
]
