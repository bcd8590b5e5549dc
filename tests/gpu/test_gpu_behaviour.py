"""How the ops behave on a GPU: memory, streams, graphs, torch.compile, indices beyond 2^31."""

from __future__ import annotations

import pytest
import torch
from _helpers.data import generator
from judging import assert_nearest
from torch import Tensor

import vqkernels
from vqkernels import nearest_code, quantize


def random(device: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(device, dtype)


def samples(device: str) -> dict[str, tuple[object, ...]]:
    """Op and arguments without the trailing backend."""
    x, codebook = random(device, 70, 24), random(device, 50, 24, seed=1)
    groups, books = random(device, 2, 3, 7, 6), random(device, 3, 5, 6, seed=1)
    mask = torch.arange(70, device=device) % 3 > 0
    one = torch.ones((), device=device)
    indices = nearest_code(x, codebook)
    indices[3] = -1
    return {
        "nearest_code": (x, codebook, "l2", "exact", None),
        "nearest_code, books": (groups, books, "cosine", "exact", None),
        "nearest_code, half": (x.half(), codebook.half(), "dot", "exact", None),
        "quantize": (
            x.clone().requires_grad_(),
            codebook.clone().requires_grad_(),
            "l2",
            mask,
            "straight_through",
            None,
        ),
        "quantize, rotation": (
            x.clone().requires_grad_(),
            codebook.clone().requires_grad_(),
            "l2",
            None,
            "rotation",
            None,
        ),
        "quantize_backward_x": (x, one, x, codebook, indices, "straight_through"),
        "quantize_backward_x, rotation": (x, one, x, codebook, indices, "rotation"),
        "quantize_backward_codebook": (one, x, codebook, indices),
    }


@pytest.mark.parametrize("name", samples("cpu"))
def test_opcheck(gpu_backend, device, name):
    op = getattr(torch.ops.vqkernels, name.partition(",")[0]).default
    torch.library.opcheck(op, (*samples(device)[name], gpu_backend))


def test_compiled_as_eager(gpu_backend, device):
    """One full graph, five steps of an optimizer, as eager."""

    def step(x: Tensor, codebook: Tensor) -> Tensor:
        output = quantize(x * 2, codebook)
        return output.quantized.square().mean() + output.commitment_loss + output.codebook_loss

    def train(function) -> list[Tensor]:
        x = random(device, 300, 16).requires_grad_()
        codebook = random(device, 40, 16, seed=1).requires_grad_()
        optimizer = torch.optim.SGD([x, codebook], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            function(x, codebook).backward()
            optimizer.step()
        return [x.detach(), codebook.detach()]

    compiled = torch.compile(step, fullgraph=True)
    for mine, expected in zip(train(compiled), train(step), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_no_matrix_of_all_scores(gpu_backend, device, only_cuda):
    """Peak memory of a call stays below a sixteenth of an N x K matrix of halves."""
    rows, codes = 65536, 16384
    for dim, dtype in ((64, torch.float16), (64, torch.float32), (8, torch.float32)):
        x = torch.randn(rows, dim, device=device, dtype=dtype)
        codebook = torch.randn(codes, dim, device=device, dtype=dtype)
        nearest_code(x, codebook)
        for call in (nearest_code, quantize):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(x, codebook)
            torch.cuda.synchronize()
            grown = torch.cuda.max_memory_allocated() - before
            assert grown < rows * codes * 2 / 16, f"{call.__name__} D={dim} {dtype}: {grown}"


def test_runs_on_the_current_stream(gpu_backend, device, only_cuda):
    """Inputs are written late on a side stream; the ops wait for them there."""
    x, codebook = random(device, 3000, 64), random(device, 500, 64, seed=1)
    expected = nearest_code(x, codebook)
    late_x, late_book = torch.zeros_like(x), torch.zeros_like(codebook)
    busy = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(30):
            busy = busy @ busy.T / busy.norm()
        late_x.copy_(x)
        late_book.copy_(codebook)
        found = nearest_code(late_x, late_book)
        output = quantize(late_x, late_book)
    stream.synchronize()
    assert torch.equal(found, expected)
    assert torch.equal(output.indices, expected)


@pytest.mark.parametrize(
    ("rows", "codes", "dim"), [(3000, 500, 64), (4, 30000, 64), (2000, 400, 8)]
)
def test_captured_in_a_graph(gpu_backend, device, only_cuda, rows, codes, dim):
    x, codebook = random(device, rows, dim), random(device, codes, dim, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        nearest_code(x, codebook)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = nearest_code(x, codebook)
    x.copy_(random(device, rows, dim, seed=5))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, nearest_code(x, codebook))


def test_a_second_device(gpu_backend, only_cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x, codebook = random("cuda:1", 300, 24), random("cuda:1", 50, 24, seed=1)
    assert torch.cuda.current_device() == 0
    indices = nearest_code(x, codebook)
    assert indices.device == x.device
    assert_nearest(x, codebook, indices)


@pytest.mark.parametrize("dim", [16, 64])
def test_elements_beyond_2_to_the_31(gpu_backend, device, only_cuda, dim):
    """The last rows lie more than 2^31 elements behind the first."""
    rows = (1 << 31) // dim + 1000
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * rows * (3 * dim + 24):
        pytest.skip(f"{free >> 30} GiB of memory are free")
    codebook = random(device, 33, dim, dtype=torch.bfloat16)
    x = torch.zeros(rows, dim, dtype=torch.bfloat16, device=device)
    x[-2000:] = random(device, 2000, dim, seed=1, dtype=torch.bfloat16)
    indices = nearest_code(x, codebook)
    assert_nearest(x[-2000:], codebook, indices[-2000:])
    assert_nearest(x[:1000], codebook, indices[:1000])
    output = quantize(x, codebook)
    assert torch.equal(output.quantized[-2000:], codebook[indices[-2000:]])
    # A count beyond 2^24 is rounded to fp32.
    assert abs(float(output.counts.double().sum()) / rows - 1) < 2.0**-23


def test_addresses_of_codes_beyond_2_to_the_31(gpu_backend, device, only_cuda):
    dim, stride = 64, 1 << 16
    codes = (1 << 31) // stride + 100
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * codes * stride:
        pytest.skip(f"{free >> 30} GiB of memory are free")
    store = torch.zeros(codes * stride, dtype=torch.bfloat16, device=device)
    codebook = store.view(codes, stride)[:, :dim]
    codebook.copy_(random(device, codes, dim, dtype=torch.bfloat16))
    x = codebook[-200:].clone()
    assert torch.equal(nearest_code(x, codebook), torch.arange(codes - 200, codes, device=device))


def test_explains_its_choice(device):
    x, codebook = random(device, 30, 16), random(device, 20, 16, seed=1)
    explanation = vqkernels.explain("nearest_code", x, codebook)
    assert explanation.backend in ("cpu", "cuda", "triton", "reference")
    with vqkernels.use_backend(explanation.backend):
        forced = nearest_code(x, codebook)
    assert torch.equal(nearest_code(x, codebook), forced)
