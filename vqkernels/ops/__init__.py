"""The ops, one file each: schema, fake kernel, gradient, public function."""

from vqkernels.ops.code_statistics import code_statistics
from vqkernels.ops.ema_update import ema_update
from vqkernels.ops.gather_codes import gather_codes
from vqkernels.ops.nearest_code import nearest_code, pack_codebook
from vqkernels.ops.quantize import QuantizeOutput, quantize
from vqkernels.ops.timestep_embedding import timestep_embedding

__all__ = [
    "QuantizeOutput",
    "code_statistics",
    "ema_update",
    "gather_codes",
    "nearest_code",
    "pack_codebook",
    "quantize",
    "timestep_embedding",
]
