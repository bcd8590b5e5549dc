"""The CUDA modulation kernels, forward and backward, against plain PyTorch in float64."""

from __future__ import annotations

import modulation_calls
import pytest
import torch
from _helpers.modulation import eager_fused, eager_gate, eager_norm
from _helpers.precision import forward_and_backward, judge
from cuda_calls import Case, CudaCalls, Device
from emulator import ORDERS, Emulator
from modulation_cases import Draw, cases
from torch.nn import functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["layer", "rms"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_cases_in_every_order(kernels: Emulator, case: Case, order: str) -> None:
    kernels.set_order(order, seed=3)
    case.run(CudaCalls(kernels.library, kernels.declare, case.device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 384), (1, 5, 1152), (2, 3, 3072), (3, 37, 70)])
@pytest.mark.parametrize("norm", NORMS)
def test_models_shapes(
    plain: CudaCalls, norm: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Vectors as models chunk them out of one linear layer's result."""
    batch, _, dim = shape
    draw = Draw(dtype)
    residual, x, *grads = (draw(*shape) for _ in range(4))
    gate, shift, scale = draw(batch, 6 * dim).chunk(6, dim=1)[:3]
    affine = draw(dim), draw(dim)
    ours, eager = modulation_calls.norm(plain, norm), eager_norm(norm)
    judge(ours, eager, (x + 0.5, shift, scale), grads)
    judge(ours, eager, (x + 0.5, shift, scale, *affine), grads)
    judge(modulation_calls.gate(plain), eager_gate, (residual, x, gate), grads)
    fused = modulation_calls.fused(plain, norm)
    judge(fused, eager_fused(norm), (residual, x, gate, shift, scale), grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [7, 384, 1152])
@pytest.mark.parametrize("norm", NORMS)
def test_outliers(plain: CudaCalls, norm: str, dim: int, dtype: torch.dtype) -> None:
    """A mean far above the deviation, the format's largest numbers, tiny rows and equal ones."""
    draw = Draw()
    rows = draw(8, dim)
    rows[0] += 1000
    rows[1] = rows[1] * 0.25 - 4000
    rows[2] *= 1e-4
    rows[3] = 3
    rows[4, 5] = 65504
    rows[5, ::2], rows[5, 1::2] = 65504, -65504
    rows[6] = 65504
    rows[7] = 0
    x = rows[None].to(dtype)
    draw = Draw(dtype, seed=1)
    shift, scale, grad = draw(1, dim), draw(1, dim), draw(1, 8, dim)
    for row in range(8):
        here = slice(row, row + 1)
        inputs = (x[:, here], shift, scale)
        judge(modulation_calls.norm(plain, norm), eager_norm(norm), inputs, [grad[:, here]])


@pytest.mark.parametrize("dim", [9, 512, 8200])
def test_a_mean_far_above_the_deviation_costs_no_digits(plain: CudaCalls, dim: int) -> None:
    x = Draw()(1, 4, dim) + 1e5
    zero = torch.zeros(1, dim)
    out = modulation_calls.norm(plain, "layer")(x, zero, zero)
    exact = F.layer_norm(x.double(), (dim,), eps=1e-6)
    assert (out.double() - exact).abs().max() <= 2e-6


@pytest.mark.parametrize("dim", [9, 40, 1152])
def test_what_is_no_number_stays_in_its_row(plain: CudaCalls, dim: int) -> None:
    draw = Draw()
    residual, x, *grads = (draw(1, 6, dim) for _ in range(4))
    vectors = [draw(1, dim) for _ in range(3)]
    good = forward_and_backward(
        modulation_calls.fused(plain, "layer"), (residual, x, *vectors), grads
    )
    residual[0, 1, 3], x[0, 4, 2] = torch.nan, torch.inf
    broken = forward_and_backward(
        modulation_calls.fused(plain, "layer"), (residual, x, *vectors), grads
    )
    kept = [0, 2, 3, 5]
    for before, after in zip(good[:4], broken[:4], strict=True):  # results, residual and x
        assert torch.equal(before[:, kept], after[:, kept])
    assert broken[0][0, [1, 4]].isnan().all()


@pytest.mark.parametrize("dim", [24, 33, 1160])
def test_the_device_does_not_change_a_bit(kernels: Emulator, dim: int) -> None:
    draw = Draw()
    inputs = [draw(2, 70, dim), draw(2, 70, dim), *(draw(2, dim) for _ in range(3))]
    grads = [draw(2, 70, dim), draw(2, 70, dim)]
    results = []
    for count, order in ((1, "forward"), (132, "shuffled")):
        kernels.set_order(order, seed=count)
        calls = CudaCalls(kernels.library, kernels.declare, Device(multiprocessors=count))
        results.append(forward_and_backward(modulation_calls.fused(calls, "layer"), inputs, grads))
    assert all(map(torch.equal, *results))
