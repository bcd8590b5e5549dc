"""The modulation ops, `bias_gelu` and `timestep_embedding` on a GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _helpers.data import generator
from _helpers.modulation import (
    eager_fused,
    eager_gate,
    eager_norm,
    our_fused,
    our_gate,
    our_norm,
    spread,
)
from _helpers.precision import forward_and_backward, judge
from torch import Tensor
from torch.nn import functional as F

import vqkernels
from vqkernels import bias_gelu, timestep_embedding
from vqkernels.backends import KERNELS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["layer", "rms"]
FORMS = ["tanh", "none"]
# Sizes of DiT-S, XL and FLUX, ragged ones, and rows that registers do not hold.
SHAPES = [(2, 256, 384), (1, 300, 1152), (2, 40, 3072), (3, 37, 70), (1, 1, 1), (1, 5, 8200)]


class Draw:
    """Random tensors on a device, the same ones for each seed."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self._device, self._dtype, self._generator = device, dtype, generator(seed)

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self._generator)
        return values.to(self._device, self._dtype)


def vectors(draw: Draw, batch: int, dim: int) -> tuple[Tensor, ...]:
    """gate, shift and scale, as models chunk them out of one linear layer's result."""
    return draw(batch, 6 * dim).chunk(6, dim=1)[:3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_modulation(modulation_backend, device, norm, shape, dtype):
    batch, _, dim = shape
    draw = Draw(device, dtype)
    residual, x, *grads = (draw(*shape) for _ in range(4))
    gate, shift, scale = vectors(draw, batch, dim)
    affine = (draw(dim), draw(dim))
    if dim > 1:
        offset = x + 0.5
    else:
        # One value's gradient under "rms" is that of its deviation from +-1, eps / (x^2 + eps): for
        # x of about 1 an ulp of the fp32 statistics is 1% of it, and eager's luck would be judged.
        residual, x = residual * 1e-3, x * 1e-3
        offset = x
    judge(our_norm(norm), eager_norm(norm), (offset, shift, scale), grads)
    judge(our_norm(norm), eager_norm(norm), (offset, shift, scale, *affine), grads)
    judge(our_gate, eager_gate, (residual, x, gate), grads)
    judge(our_fused(norm), eager_fused(norm), (residual, x, gate, shift, scale), grads)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 1152), (torch.bfloat16, 2560),
                                            (torch.float32, 1152)])  # fmt: skip
def test_more_rows_than_a_device_holds(modulation_backend, device, only_cuda, dim, dtype):
    """What a kernel does with one row after another: fewer rows get a program or a warp each."""
    draw = Draw(device, dtype)
    residual, x, *grads = (draw(72, 256, dim) for _ in range(4))
    gate, shift, scale = vectors(draw, 72, dim)
    judge(our_norm("layer"), eager_norm("layer"), (x, shift, scale), grads)
    judge(our_fused("layer"), eager_fused("layer"), (residual, x, gate, shift, scale), grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 4, 100, 300])
@pytest.mark.parametrize("dim", [96, 1152])
def test_vectors_of_frames_and_tokens(modulation_backend, device, dim, frames, dtype):
    draw = Draw(device, dtype)
    residual, x, *grads = (draw(2, 300, dim) for _ in range(4))
    gate, shift = (draw(2, frames, 2 * dim).chunk(2, -1)[0] for _ in range(2))
    scale = draw(2, dim)
    affine = (draw(dim), draw(dim))
    for chosen in ((gate, shift, shift + 1), (scale, gate, shift), (gate, scale, scale)):
        judge(our_fused("layer"), eager_fused("layer"), (residual, x, *chosen), grads)
        judge(our_norm("layer"), eager_norm("layer"), (x, *chosen[1:], *affine), grads)
    judge(our_gate, eager_gate, (residual, x, gate), grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_outliers(modulation_backend, device, norm, dtype):
    """A mean far above the deviation, the format's largest numbers, tiny rows and equal ones. The
    branch is zero: such rows would amplify the rounding of the gated sum, and judge luck."""
    dim = 1152
    draw = Draw(device)
    rows = draw(8, dim)
    rows[0] += 1000
    rows[1] = rows[1] * 0.25 - 4000
    rows[2] *= 1e-4
    rows[3] = 3
    rows[4, 7] = 65504
    rows[5, ::2], rows[5, 1::2] = 65504, -65504
    rows[6] = 65504
    rows[7] = 0
    x = rows[None].to(dtype)
    draw = Draw(device, dtype, seed=1)
    shift, scale, gate, grad = draw(1, dim), draw(1, dim), draw(1, dim), draw(1, 8, dim)
    nothing = torch.zeros_like(grad)
    for row in range(8):
        here = slice(row, row + 1)
        judge(our_norm(norm), eager_norm(norm), (x[:, here], shift, scale), [grad[:, here]])
        inputs = (x[:, here], nothing[:, here], gate, shift, scale)
        grads = [grad[:, here], grad[:, here].flip(-1)]
        judge(our_fused(norm), eager_fused(norm), inputs, grads)


def test_a_mean_far_above_the_deviation_costs_no_digits(modulation_backend, device):
    for dim in (512, 1152, 8200):
        x = Draw(device)(1, 20, dim) + 1e5
        zero = torch.zeros(1, dim, device=device)
        out = our_norm("layer")(x, zero, zero)
        exact = F.layer_norm(x.double(), (dim,), eps=1e-6)
        assert (out.double() - exact).abs().max() <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_in_its_row(modulation_backend, device, dtype):
    draw = Draw(device, dtype)
    for dim in (40, 1152, 8200):
        x, gate, shift, scale = draw(2, 6, dim), draw(2, dim), draw(2, dim), draw(2, dim)
        clean = our_norm("layer")(x, shift, scale)
        x[0, 2, 3], x[1, 4, 0], x[1, 5, 39] = torch.nan, torch.inf, -torch.inf
        broken = torch.zeros(2, 6, dtype=torch.bool, device=device)
        broken[0, 2] = broken[1, 4] = broken[1, 5] = True
        out = our_norm("layer")(x, shift, scale)
        assert out[broken].isnan().all()
        assert torch.equal(out[~broken], clean[~broken])
        normed, stream = our_fused("layer")(x, x, gate, shift, scale)
        assert normed[broken].isnan().all()
        assert normed[~broken].isfinite().all()
        assert (stream.isfinite() == x.isfinite()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_give_what_their_copies_give(modulation_backend, device, dtype):
    draw = Draw(device, dtype)
    batch, tokens, dim = 2, 10, 48
    gate, shift, scale = vectors(draw, batch, dim)
    wide = draw(batch, tokens, 2 * dim)
    by_column = draw(batch, dim, tokens).transpose(1, 2)
    for x in (wide[..., :dim], wide[:, :, ::2], by_column, wide[:, :1, :dim].expand(-1, 10, -1)):
        calls: list[tuple[Callable[..., object], tuple[Tensor, ...]]] = [
            (our_norm("layer"), (x, shift, scale)),
            (our_gate, (x, x.flip(1), gate)),
            (our_fused("layer"), (x, x.flip(1), gate, shift, scale)),
        ]
        if modulation_backend != "cuda":
            calls.append((bias_gelu, (x, shift[0])))
        for function, inputs in calls:
            grads = [wide[..., dim:], wide[..., :dim]]
            found = forward_and_backward(function, inputs, grads)
            copies = [t.contiguous() for t in inputs]
            expected = forward_and_backward(function, copies, [g.contiguous() for g in grads])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [384, 1152, 8200])
def test_same_bits_on_every_run(modulation_backend, device, dim, dtype):
    draw = Draw(device, dtype)
    residual, x, *grads = (draw(4, 300, dim) for _ in range(4))
    gate, shift, scale = vectors(draw, 4, dim)
    affine = (draw(dim), draw(dim))

    def everything() -> list[Tensor]:
        found = forward_and_backward(our_fused("layer"), (residual, x, gate, shift, scale), grads)
        found += forward_and_backward(our_norm("rms"), (x, shift, scale, *affine), grads)
        found += forward_and_backward(our_gate, (residual, x, gate), grads)
        if modulation_backend != "cuda":
            found += forward_and_backward(bias_gelu, (x, affine[0]), grads)
        return found

    first = everything()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


def eager_gelu(approximate: str) -> Callable[..., Tensor]:
    return lambda x, bias: F.gelu(x + bias, approximate=approximate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3, 33), (300, 70), (200, 4608), (0, 8)])
@pytest.mark.parametrize("approximate", FORMS)
def test_bias_gelu(triton_backend, device, approximate, shape, dtype):
    draw = Draw(device, dtype)
    x, grad, bias = 2 * draw(*shape), draw(*shape), draw(shape[-1])

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(x, bias, approximate=approximate)

    if x.numel() == 0:
        assert (forward_and_backward(ours, (x, bias), [grad])[2] == 0).all()
    else:
        judge(ours, eager_gelu(approximate), (x, bias), [grad])


@pytest.mark.parametrize("approximate", FORMS)
def test_gelu_of_every_magnitude(triton_backend, device, approximate):
    """Values within 4e-7 of |u|: 2 ulp of a division (2.4e-7), a quarter of 2^-22 of a power of two
    (0.6e-7) and the rounding of its sum with one (0.6e-7). Slopes within 1e-6."""
    sizes = torch.cat([torch.logspace(-30, 30, 20001), torch.linspace(0, 16, 60001)])
    x = torch.cat([sizes, -sizes]).view(2, -1).to(device)
    ones = torch.ones_like(x)
    value, slope = forward_and_backward(
        lambda x: bias_gelu(x, approximate=approximate), (x,), [ones]
    )
    exact = forward_and_backward(
        lambda x: F.gelu(x, approximate=approximate), (x.double().clamp(-20, 20),), [ones.double()]
    )
    exact_value = torch.where(x.abs() > 20, x.double().clamp(min=0), exact[0])
    assert ((value.double() - exact_value).abs() <= 4e-7 * x.double().abs() + 1e-27).all()
    assert (slope.double() - exact[1]).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", FORMS)
def test_gelu_of_infinities_and_nan(triton_backend, device, approximate, dtype):
    big = torch.finfo(dtype).max
    row = torch.tensor([torch.inf, -torch.inf, torch.nan, big, -big, 0.0, -0.0, 1.0])
    x = row.repeat(3, 5).to(device, dtype)
    value, slope = forward_and_backward(
        lambda x: bias_gelu(x, approximate=approximate), (x,), [torch.ones_like(x)]
    )
    v, g = value[0, :8].float().cpu(), slope[0, :8].float().cpu()
    assert v[0] == torch.inf
    assert v[3] == big
    assert v[[1, 4]].abs().max() <= 1e-26
    assert v[[5, 6]].abs().max() == 0
    assert v[2].isnan()
    assert g[2].isnan()
    assert (g[[0, 1, 3, 4, 5]] - torch.tensor([1.0, 0, 1, 0, 0.5])).abs().max() <= 1e-26


@pytest.mark.parametrize("dim", [1, 2, 7, 256, 257, 600])
@pytest.mark.parametrize("max_period", [10000.0, 2.0, 1e6])
def test_timestep_embedding(triton_backend, device, dim, max_period):
    t = torch.cat([torch.rand(50) * 1000, torch.tensor([0.0, -3.5, 999.0, 1e4, -1e4])]).to(device)
    half = dim // 2
    powers = -torch.arange(half, dtype=torch.float64, device=device) / max(half, 1)
    angles = t.double()[:, None] * max_period**powers
    zeros = angles.new_zeros(len(t), dim % 2)
    exact = torch.cat([angles.cos(), angles.sin(), zeros], 1)
    embedding = timestep_embedding(t, dim, max_period)
    assert embedding.shape == exact.shape
    assert (embedding.double() - exact).abs().max() <= 2e-6
    broken = timestep_embedding(torch.tensor([torch.nan, torch.inf, 3e38], device=device), 6)
    assert broken[:2].isnan().all()
    assert (broken[2].abs() <= 1).all()


def samples(device: str) -> dict[str, tuple[object, ...]]:
    draw = Draw(device)
    x, residual = draw(2, 9, 40), draw(2, 9, 40)
    gate, shift, scale = vectors(draw, 2, 40)
    row, statistics = draw(40), draw(2, 9, 2)
    return {
        "ada_layer_norm": (x.clone().requires_grad_(), shift, scale, row, row, 1e-6, "layer"),
        "ada_layer_norm_backward": (x, x, shift, scale, row, None, statistics, "rms"),
        "gated_residual": (residual, x.clone().requires_grad_(), gate),
        "gated_residual_backward": (residual, x, gate),
        "gated_residual_ada_layer_norm": (residual, x, gate, shift, scale, 1e-6, "layer"),
        "gated_residual_ada_layer_norm_backward": (
            *(x, residual, x, x, gate, shift, scale, statistics),
            "layer",
        ),
        "bias_gelu": (x.clone().requires_grad_(), row, "tanh"),
        "bias_gelu_backward": (x, x, None, "none"),
        "timestep_embedding": (x[:, 0, 0], 33, 1e4),
    }


@pytest.mark.parametrize("name", samples("cpu"))
def test_opcheck(modulation_backend, device, name):
    if modulation_backend not in (*KERNELS[name.removesuffix("_backward")], "reference"):
        pytest.skip(f"{name} has no {modulation_backend} kernel")
    op = getattr(torch.ops.vqkernels, name).default
    torch.library.opcheck(op, (*samples(device)[name], modulation_backend))


def test_compiled_as_eager(triton_backend, device):
    """One full graph, five steps of an optimizer, as eager."""

    def step(x: Tensor, weight: Tensor, row: Tensor) -> Tensor:
        gate, shift, scale = (x.mean(1) @ weight).chunk(3, dim=1)
        normed, stream = our_fused("layer")(x, x * 0.5, gate, shift, scale)
        return bias_gelu(our_norm("rms")(normed, shift, scale), row).square().mean() + stream.mean()

    def train(function: Callable[..., Tensor]) -> list[Tensor]:
        draw = Draw(device)
        leaves = [draw(2, 30, 64), draw(64, 192) * 0.1, draw(64)]
        for leaf in leaves:
            leaf.requires_grad_()
        optimizer = torch.optim.SGD(leaves, lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            function(*leaves).backward()
            optimizer.step()
        return [leaf.detach() for leaf in leaves]

    compiled = torch.compile(step, fullgraph=True)
    for mine, expected in zip(train(compiled), train(step), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_vectors_are_read_in_place(modulation_backend, device, only_cuda):
    """No copy of a strided shift or scale: nothing but the results is allocated."""
    x = torch.randn(64, 256, 1152, device=device, dtype=torch.bfloat16)
    shift, scale = torch.randn(64, 6 * 1152, device=device).chunk(6, dim=1)[1:3]
    our_norm("layer")(x, shift, scale)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = our_norm("layer")(x, shift, scale)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= out.numel() * 2 + 8 * 64 * 256 + 4096


def test_captured_in_a_graph(modulation_backend, device, only_cuda):
    draw = Draw(device)
    x, (gate, shift, scale) = draw(2, 64, 384), vectors(draw, 2, 384)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        our_fused("layer")(x, x, gate, shift, scale)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        normed, _ = our_fused("layer")(x, x, gate, shift, scale)
    x.copy_(draw(2, 64, 384))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(normed, our_fused("layer")(x, x, gate, shift, scale)[0])


def test_elements_beyond_2_to_the_31(modulation_backend, device, only_cuda):
    """The last tokens lie more than 2^31 elements behind the first."""
    dim = 1152
    tokens = (1 << 31) // dim + 1000
    free, _ = torch.cuda.mem_get_info()
    if free < 14 * tokens * dim:
        pytest.skip(f"{free >> 30} GiB of memory are free")
    draw = Draw(device, torch.bfloat16)
    gate, shift, scale = vectors(draw, 1, dim)
    last = draw(1, 500, dim)
    x = torch.zeros(1, tokens, dim, dtype=torch.bfloat16, device=device)
    x[:, -500:] = last
    normed, stream = our_fused("layer")(x, x, gate, shift, scale)
    expected = our_fused("layer")(last, last, gate, shift, scale)
    assert torch.equal(normed[:, -500:], expected[0])
    assert torch.equal(stream[:, -500:], expected[1])
    del normed, stream
    found = forward_and_backward(our_norm("layer"), (x, shift, scale), [x])
    expected = forward_and_backward(our_norm("layer"), (last, shift, scale), [last])
    assert torch.equal(found[1][:, -500:], expected[1])
    assert torch.equal(found[0][:, -500:], expected[0])
    del found
    if modulation_backend != "cuda":
        assert torch.equal(bias_gelu(x)[:, -500:], bias_gelu(last))


def test_the_automatic_choice(device):
    """Serves the calls, and names its kernel."""
    draw = Draw(device)
    x, (gate, shift, scale) = draw(2, 9, 40), vectors(draw, 2, 40)
    chosen = vqkernels.explain("ada_layer_norm", x, shift=shift, scale=scale).backend
    assert chosen in (("triton", "reference") if device == "cuda" else ("cpu", "reference"))
    for norm in NORMS:
        judge(our_norm(norm), eager_norm(norm), (x, shift, scale), [x])
        judge(our_fused(norm), eager_fused(norm), (x, x, gate, shift, scale), [x, x])
    assert torch.equal(spread(gate, 9)[:, 4], gate)
