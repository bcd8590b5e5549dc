"""Modules over the ops: quantizers and transformer parts."""

from vqkernels.nn.ada_layer_norm_zero import AdaLayerNormZero
from vqkernels.nn.codebook import Codebook
from vqkernels.nn.dit_block import MLP, DiTBlock, FinalLayer, SelfAttention
from vqkernels.nn.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder
from vqkernels.nn.vector_quantize import LossBreakdown, VectorQuantize

__all__ = [
    "MLP",
    "AdaLayerNormZero",
    "Codebook",
    "DiTBlock",
    "FinalLayer",
    "LabelEmbedder",
    "LossBreakdown",
    "PatchEmbed",
    "SelfAttention",
    "TimestepEmbedder",
    "VectorQuantize",
]
