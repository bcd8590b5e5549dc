"""The ops, one file each: schema, fake kernel, gradient, public function."""

from vqkernels.ops.ada_layer_norm import ada_layer_norm
from vqkernels.ops.attention import attention
from vqkernels.ops.attention_qkvpacked import attention_qkvpacked
from vqkernels.ops.attention_varlen import attention_varlen
from vqkernels.ops.bias_gelu import bias_gelu
from vqkernels.ops.code_statistics import code_statistics
from vqkernels.ops.denoise_step import DenoiseStepOutput, denoise_coefficients, denoise_step
from vqkernels.ops.diffuse import diffuse
from vqkernels.ops.diffusion_loss import diffusion_loss
from vqkernels.ops.ema_update import ema_update
from vqkernels.ops.gated_residual import gated_residual
from vqkernels.ops.gated_residual_ada_layer_norm import gated_residual_ada_layer_norm
from vqkernels.ops.gather_codes import gather_codes
from vqkernels.ops.modulated_attention import modulated_attention
from vqkernels.ops.modulated_mlp import modulated_mlp
from vqkernels.ops.nearest_code import nearest_code, pack_codebook
from vqkernels.ops.normal_noise import normal_noise
from vqkernels.ops.qk_norm_rope import qk_norm_rope, rope_tables
from vqkernels.ops.quantize import QuantizeOutput, quantize
from vqkernels.ops.timestep_embedding import timestep_embedding

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
]
