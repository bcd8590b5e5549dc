"""Fast building blocks for vector quantizers and Diffusion Transformers."""

from vqkernels import native
from vqkernels.backends import explain, use_backend
from vqkernels.ops import (
    QuantizeOutput,
    code_statistics,
    ema_update,
    gather_codes,
    nearest_code,
    pack_codebook,
    quantize,
    timestep_embedding,
)

native.load()

__version__ = "0.1.0"

__all__ = [
    "QuantizeOutput",
    "code_statistics",
    "ema_update",
    "explain",
    "gather_codes",
    "nearest_code",
    "pack_codebook",
    "quantize",
    "timestep_embedding",
    "use_backend",
]
