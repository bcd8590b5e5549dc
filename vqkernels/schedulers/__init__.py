"""Samplers: diffusers' schedulers over one step kernel, and a sampling loop.

Beside them what training needs of a noise schedule: loss weights, times, conversions.
"""

from vqkernels.schedulers.conversions import (
    DataTime,
    DDPMIndex,
    EDMSigma,
    Level,
    NoiseTime,
    convert_prediction,
    rescale,
)
from vqkernels.schedulers.ddim import DDIMScheduler
from vqkernels.schedulers.ddim_inverse import DDIMInverseScheduler
from vqkernels.schedulers.ddpm import DDPMScheduler
from vqkernels.schedulers.dpm_solver_multistep import DPMSolverMultistepScheduler
from vqkernels.schedulers.edm_euler import EDMEulerScheduler
from vqkernels.schedulers.euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from vqkernels.schedulers.euler_discrete import EulerDiscreteScheduler
from vqkernels.schedulers.flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from vqkernels.schedulers.flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from vqkernels.schedulers.heun_discrete import HeunDiscreteScheduler
from vqkernels.schedulers.lcm import LCMScheduler
from vqkernels.schedulers.sampling import SamplingState, sample
from vqkernels.schedulers.unipc_multistep import UniPCMultistepScheduler
from vqkernels.schedulers.variational_bound import variational_bound
from vqkernels.schedulers.weighting import (
    edm_weight,
    min_snr_weight,
    p2_weight,
    sample_times,
    sd3_weight,
    soft_min_snr_weight,
)

__all__ = [
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMIndex",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DataTime",
    "EDMEulerScheduler",
    "EDMSigma",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "Level",
    "NoiseTime",
    "SamplingState",
    "UniPCMultistepScheduler",
    "convert_prediction",
    "edm_weight",
    "min_snr_weight",
    "p2_weight",
    "rescale",
    "sample",
    "sample_times",
    "sd3_weight",
    "soft_min_snr_weight",
    "variational_bound",
]
