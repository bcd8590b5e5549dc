"""Samplers."""

from vqkernels.schedulers.rectified_flow import TIME_SCALE, euler_sample

__all__ = ["TIME_SCALE", "euler_sample"]
