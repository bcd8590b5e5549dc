"""`timestep_embedding` against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vqkernels import timestep_embedding

every_capability = pytest.mark.every_capability


def formula(t: Tensor, dim: int, max_period: float) -> Tensor:
    half = dim // 2
    columns = []
    for function in (torch.cos, torch.sin):
        for i in range(half):
            columns.append(function(t.double() * max_period ** (-i / half)))
    columns += [torch.zeros(len(t), dtype=torch.float64)] * (dim % 2)
    return torch.stack(columns, dim=1)


@every_capability
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 16, 33, 256, 257])
@pytest.mark.parametrize("max_period", [10000.0, 2.0, 1.0, 1e6])
def test_formula(backend: str, dim: int, max_period: float) -> None:
    t = torch.cat(
        [torch.linspace(0, 1, 11), torch.rand(50) * 1000, torch.tensor([-3.5, 999.0, 1e4, -1e4])]
    )
    embedding = timestep_embedding(t, dim, max_period)
    assert embedding.dtype == torch.float32
    assert embedding.shape == (len(t), dim)
    assert (embedding.double() - formula(t, dim, max_period)).abs().max() <= 2e-6


@every_capability
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integers(backend: str, dtype: torch.dtype) -> None:
    t = torch.arange(120).to(dtype)
    assert torch.equal(timestep_embedding(t, 32), timestep_embedding(t.float(), 32))


def test_float64_goes_to_the_reference() -> None:
    t = torch.rand(20, dtype=torch.float64) * 1000
    assert (timestep_embedding(t, 32).double() - formula(t, 32, 10000.0)).abs().max() <= 1e-7


@every_capability
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    t = (torch.rand(40) * 100).to(dtype)
    embedding = timestep_embedding(t, 10)
    assert embedding.dtype == torch.float32
    assert (embedding.double() - formula(t, 10, 10000.0)).abs().max() <= 2e-6


@every_capability
def test_empty_and_strided(backend: str) -> None:
    assert timestep_embedding(torch.zeros(0), 8).shape == (0, 8)
    t = torch.rand(30) * 50
    assert torch.equal(timestep_embedding(t[::3], 8), timestep_embedding(t[::3].clone(), 8))
    one = timestep_embedding(torch.tensor(2.5).expand(4), 8)
    assert torch.equal(one, timestep_embedding(torch.full((4,), 2.5), 8))


@every_capability
def test_what_is_no_number_stays_in_its_row(backend: str) -> None:
    t = torch.tensor([1.0, math.nan, math.inf, 2.0])
    embedding = timestep_embedding(t, 6)
    assert embedding[1:3].isnan().all()
    assert torch.equal(embedding[[0, 3]], timestep_embedding(t[[0, 3]], 6))


def test_default_period() -> None:
    t = torch.rand(5) * 1000
    assert torch.equal(timestep_embedding(t, 12), timestep_embedding(t, 12, 10000.0))


def test_under_compile_and_autocast(backend: str) -> None:
    torch._dynamo.reset()
    t = torch.rand(4) * 100
    expected = timestep_embedding(t, 8)
    compiled = torch.compile(timestep_embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(t, 8), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(timestep_embedding(t, 8), expected)


def test_no_gradient(backend: str) -> None:
    t = torch.rand(5, requires_grad=True)
    with pytest.raises(NotImplementedError, match="detach"):
        timestep_embedding(t, 8).sum().backward()


BAD_CALLS = {
    "rank 0": (lambda: timestep_embedding(torch.tensor(1.0), 8), ValueError, r"t must be \[B\]"),
    "rank 2": (lambda: timestep_embedding(torch.rand(3, 1), 8), ValueError, r"t.*\[3, 1\]"),
    "float": (lambda: timestep_embedding(1.0, 8), TypeError, "t must be.*float"),
    "complex": (lambda: timestep_embedding(torch.rand(3) + 0j, 8), TypeError, "t must.*complex"),
    "bool": (lambda: timestep_embedding(torch.rand(3) > 0, 8), TypeError, "t must.*bool"),
    "dim": (lambda: timestep_embedding(torch.rand(3), 0), ValueError, "dim.*0"),
    "period": (lambda: timestep_embedding(torch.rand(3), 8, 0.0), ValueError, "max_period.*0.0"),
    "no period": (
        lambda: timestep_embedding(torch.rand(3), 8, math.nan),
        ValueError,
        "max_period.*nan",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(backend: str, case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()
