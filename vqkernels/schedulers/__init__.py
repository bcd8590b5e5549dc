"""Samplers: diffusers' schedulers over one step kernel, and rectified flow's Euler loop."""

from vqkernels.schedulers.ddim import DDIMScheduler
from vqkernels.schedulers.ddim_inverse import DDIMInverseScheduler
from vqkernels.schedulers.ddpm import DDPMScheduler
from vqkernels.schedulers.dpm_solver_multistep import DPMSolverMultistepScheduler
from vqkernels.schedulers.lcm import LCMScheduler
from vqkernels.schedulers.rectified_flow import TIME_SCALE, euler_sample
from vqkernels.schedulers.unipc_multistep import UniPCMultistepScheduler

__all__ = [
    "TIME_SCALE",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "LCMScheduler",
    "UniPCMultistepScheduler",
    "euler_sample",
]
