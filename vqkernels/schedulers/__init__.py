"""Samplers: diffusers' schedulers over one step kernel, and rectified flow's Euler loop."""

from vqkernels.schedulers.ddim import DDIMScheduler
from vqkernels.schedulers.ddim_inverse import DDIMInverseScheduler
from vqkernels.schedulers.ddpm import DDPMScheduler
from vqkernels.schedulers.edm_euler import EDMEulerScheduler
from vqkernels.schedulers.euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from vqkernels.schedulers.euler_discrete import EulerDiscreteScheduler
from vqkernels.schedulers.flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from vqkernels.schedulers.flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from vqkernels.schedulers.heun_discrete import HeunDiscreteScheduler
from vqkernels.schedulers.lcm import LCMScheduler
from vqkernels.schedulers.rectified_flow import TIME_SCALE, euler_sample

__all__ = [
    "TIME_SCALE",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "euler_sample",
]
