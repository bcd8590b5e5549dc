"""CUDA `diffuse` and `denoise_step`, the source that nvcc compiles, on the CPU."""

from __future__ import annotations

import math

import noise_calls
import pytest
import torch
from cuda_calls import Case, CudaCalls, Device
from emulator import ORDERS, Emulator
from noise_cases import KEY, TABLE, Draw, cases, check_diffuse, check_step, quantiles, rescaled
from torch import Tensor

from vqkernels.ops.denoise_step import denoise_coefficients
from vqkernels.reference import normal_noise as normal_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_cases_in_every_order(kernels: Emulator, case: Case, order: str) -> None:
    kernels.set_order(order, seed=3)
    case.run(CudaCalls(kernels.library, kernels.declare, case.device))
