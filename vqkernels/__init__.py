"""Fast building blocks for vector quantizers and Diffusion Transformers."""

from vqkernels import native
from vqkernels.backends import explain, use_backend
from vqkernels.ops import (
    QuantizeOutput,
    ada_layer_norm,
    attention,
    attention_qkvpacked,
    attention_varlen,
    bias_gelu,
    code_statistics,
    diffuse,
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
    "QuantizeOutput",
    "ada_layer_norm",
    "attention",
    "attention_qkvpacked",
    "attention_varlen",
    "bias_gelu",
    "code_statistics",
    "diffuse",
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
