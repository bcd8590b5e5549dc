"""Models: the VQ-VAE tokenizer and the Diffusion Transformer over its latents."""

from vqkernels.models.dit import DiT, DiT_models
from vqkernels.models.vqvae import VQVAE, VQVAEConfig, VQVAEOutput

__all__ = ["VQVAE", "DiT", "DiT_models", "VQVAEConfig", "VQVAEOutput"]
