"""The codebook ops under `torch.compile(fullgraph=True)`: one compilation, results as in eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import vqkernels


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Quantizer(torch.nn.Module):
    """A linear encoder, a book learned by EMA or by gradient, and a linear decoder."""

    def __init__(self, dim: int = 6, codes: int = 12) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(dim, dim)
        self.decoder = torch.nn.Linear(dim, dim)
        self.learned = torch.nn.Parameter(torch.randn(codes, dim))
        self.register_buffer("codebook", torch.randn(codes, dim))
        self.register_buffer("cluster_size", torch.ones(codes))
        self.register_buffer("embed_sum", self.codebook.clone())

    def forward(self, x: Tensor, decay: Tensor, seed: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and the book's next state; the seed rolls the order of the rows."""
        hidden = self.encoder(x + 1e-3 * seed)
        first = vqkernels.quantize(hidden, self.codebook)
        second = vqkernels.quantize(hidden - first.quantized.detach(), self.learned)
        rows = vqkernels.gather_codes(self.learned, second.indices)
        output = self.decoder(first.quantized + second.quantized)
        loss = torch.nn.functional.mse_loss(output, x) + rows.square().mean() * 1e-3
        loss = loss + 0.25 * (first.commitment_loss + second.commitment_loss)
        loss = loss + second.codebook_loss
        with torch.no_grad():
            codes = self.codebook.shape[0]
            counts, sums = vqkernels.code_statistics(hidden.detach(), first.indices, codes)
            state = vqkernels.ema_update(
                self.codebook,
                self.cluster_size,
                self.embed_sum,
                counts,
                sums,
                decay=decay,
                eps=1e-5,
            )
        return loss, state


Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]


def train(model: Quantizer, step: Step, steps: int = 10) -> list[float]:
    """Ten optimizer steps with a decay and a seed that change every time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for i in range(steps):
        x = torch.randn(40, 6, generator=generator)
        loss, state = step(x, torch.tensor(0.5 + 0.04 * i), torch.tensor(i * 7919))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            buffers = (model.codebook, model.cluster_size, model.embed_sum)
            for buffer, new in zip(buffers, state, strict=True):
                buffer.copy_(new)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_ten_optimizer_steps_with_one_compilation(native_cpu: None, compiler: str) -> None:
    assert_trains_as_eager(compiler)


def test_ten_optimizer_steps_on_the_reference() -> None:
    with vqkernels.use_backend("reference"):
        assert_trains_as_eager("aot_eager")


def assert_trains_as_eager(compiler: str) -> None:
    torch.manual_seed(1)
    eager = Quantizer()
    compiled = Quantizer()
    compiled.load_state_dict(eager.state_dict())
    counter = CompileCounterWithBackend(compiler)
    step = torch.compile(compiled, fullgraph=True, backend=counter)

    expected, found = train(eager, eager), train(compiled, step)
    assert counter.frame_count == 1
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[-1] != expected[0]
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(
            compiled.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
        )


def test_every_op_equals_eager_bit_by_bit(backend: str) -> None:
    x, codebook = torch.randn(3, 50, 6), torch.randn(9, 6)
    packed = vqkernels.pack_codebook(codebook)
    mask = torch.rand(3, 50) < 0.8

    def everything(x: Tensor, codebook: Tensor) -> list[Tensor]:
        indices = vqkernels.nearest_code(x, codebook, metric="cosine")
        return [
            indices,
            vqkernels.nearest_code(x, codebook, packed=packed),
            vqkernels.nearest_code(x.transpose(0, 1), codebook),
            vqkernels.gather_codes(codebook, indices),
            *vqkernels.code_statistics(x, indices, 9),
            *vqkernels.quantize(x, codebook, mask=mask, metric="dot"),
        ]

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(compiled(x, codebook), everything(x, codebook), strict=True):
        assert torch.equal(mine, plain)
        assert mine.stride() == plain.stride()


class Block(torch.nn.Module):
    """The modulated parts of a transformer block, every parameter random."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.modulation = torch.nn.Linear(4, 6 * dim)
        self.mixer, self.fc1 = torch.nn.Linear(dim, dim), torch.nn.Linear(dim, 2 * dim, bias=False)
        self.fc1_bias = torch.nn.Parameter(torch.randn(2 * dim))
        self.fc2 = torch.nn.Linear(2 * dim, dim)
        self.weight, self.bias = (torch.nn.Parameter(torch.randn(dim)) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(6, dim=1)
        normed = vqkernels.ada_layer_norm(
            x, shift=shift, scale=scale, weight=self.weight, bias=self.bias
        )
        normed, x = vqkernels.gated_residual_ada_layer_norm(
            x, self.mixer(normed), gate=gate, shift=shift_2, scale=scale_2, norm="rms"
        )
        hidden = vqkernels.bias_gelu(self.fc1(normed), self.fc1_bias)
        return vqkernels.gated_residual(x, self.fc2(hidden), gate=gate_2)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_ten_steps_of_a_modulated_block(native_cpu: None, compiler: str) -> None:
    torch.manual_seed(2)
    eager, compiled = Block(), Block()
    compiled.load_state_dict(eager.state_dict())
    counter = CompileCounterWithBackend(compiler)
    step = torch.compile(compiled, fullgraph=True, backend=counter)
    losses: list[list[float]] = []
    for model, call in ((eager, eager), (compiled, step)):
        generator = torch.Generator().manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(10):
            x = torch.randn(3, 7, 24, generator=generator)
            loss = (call(x, torch.randn(3, 4, generator=generator)) - x.flip(-1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert counter.frame_count == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] != losses[0][0]


def test_the_branches_of_a_block_as_in_eager(backend: str) -> None:
    from vqkernels.nn import DiTBlock

    block = DiTBlock(24, 3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    attn, mlp = block.attn, block.mlp

    def branches(x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, *others = block.adaLN_modulation(c).chunk(6, dim=-1)
        x = vqkernels.modulated_attention(
            x, shift=shift, scale=scale, gate=gate, num_heads=3,
            qkv_weight=attn.qkv.weight, qkv_bias=attn.qkv.bias,
            proj_weight=attn.proj.weight, proj_bias=attn.proj.bias,
        )  # fmt: skip
        shift, scale, gate = others
        return block(vqkernels.modulated_mlp(
            x, shift=shift, scale=scale, gate=gate,
            fc1_weight=mlp.fc1.weight, fc1_bias=mlp.fc1.bias,
            fc2_weight=mlp.fc2.weight, fc2_bias=mlp.fc2.bias,
        ), c)  # fmt: skip

    compiled = torch.compile(branches, fullgraph=True, backend="aot_eager")
    x, c = torch.randn(2, 12, 24), torch.randn(2, 24)
    leaves = [x.requires_grad_(), c.requires_grad_(), *block.parameters()]
    found, plain = compiled(x, c), branches(x, c)
    torch.testing.assert_close(found, plain)
    grad = torch.randn_like(plain)
    ours = torch.autograd.grad(found, leaves, grad)
    for mine, true in zip(ours, torch.autograd.grad(plain, leaves, grad), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)


def test_modulation_equals_eager_bit_by_bit(backend: str) -> None:
    x, y = torch.randn(2, 12, 40), torch.randn(2, 12, 40)
    gate, shift, scale = torch.randn(2, 240).chunk(6, dim=1)[:3]

    def everything(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Any:
        return (
            vqkernels.ada_layer_norm(x, shift=shift, scale=scale),
            vqkernels.gated_residual(x, y, gate=gate),
            *vqkernels.gated_residual_ada_layer_norm(
                x, y, gate=gate, shift=shift, scale=scale, norm="rms"
            ),
            vqkernels.bias_gelu(x.mT, x[0, :, 0], approximate="none"),
        )

    leaves = [t.clone().requires_grad_() for t in (x, y, gate, shift, scale)]
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    found, plain = compiled(*leaves), everything(*leaves)
    for mine, true in zip(found, plain, strict=True):
        assert torch.equal(mine, true)
        assert mine.stride() == true.stride()
    grads = [torch.randn_like(t) for t in plain]
    ours = torch.autograd.grad(found, leaves, grads)
    for mine, true in zip(ours, torch.autograd.grad(plain, leaves, grads), strict=True):
        assert torch.equal(mine, true)


def test_modulation_at_many_sizes_with_one_compilation(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return vqkernels.bias_gelu(vqkernels.ada_layer_norm(x, shift=shift, scale=scale))

    compiled = torch.compile(norm, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for batch, tokens in ((3, 5), (2, 64), (4, 33)):
        x = torch.randn(batch, tokens, 16, requires_grad=True)
        shift, scale = torch.randn(batch, 16), torch.randn(batch, 16)
        out = compiled(x, shift, scale)
        assert torch.equal(out, norm(x, shift, scale))
        out.sum().backward()
        assert x.grad is not None
        compilations.append(counter.frame_count)
    assert compilations[-1] == compilations[0]


def test_dynamic_batch_size(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def losses(x: Tensor, codebook: Tensor) -> Tensor:
        output = vqkernels.quantize(x, codebook)
        counts, sums = vqkernels.code_statistics(x.detach(), output.indices, 9)
        return output.commitment_loss + output.quantized.sum() + counts.sum() + sums.mean()

    compiled = torch.compile(losses, fullgraph=True, backend=counter)
    codebook = torch.randn(9, 6)
    for rows in (30, 7, 64, 201):
        x = torch.randn(rows, 6, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        loss = compiled(x, codebook)
        loss.backward()
        plain = x.detach().requires_grad_()
        expected = losses(plain, codebook)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        assert torch.equal(x.grad, plain.grad)
    assert counter.frame_count == 1


def test_the_backend_asked_for_is_the_one_compiled(native_cpu: None) -> None:
    x, codebook = torch.randn(9, 6), torch.randn(5, 6)
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(n.args[-1]) for n in graph.graph.nodes if "nearest_code" in str(n.target))
        return graph.forward

    for name in ("reference", "cpu"):
        torch._dynamo.reset()
        with vqkernels.use_backend(name):
            torch.compile(vqkernels.nearest_code, fullgraph=True, backend=spy)(x, codebook)
    assert seen == ["reference", "cpu"]


def test_changing_the_backend_recompiles(native_cpu: None) -> None:
    """A compiled function must not keep serving the backend of its first call."""
    x, codebook = torch.randn(9, 6), torch.randn(5, 6)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vqkernels.nearest_code, fullgraph=True, backend=counter)
    for name in ("reference", "cpu", "reference", "cpu"):
        with vqkernels.use_backend(name):
            compiled(x, codebook)
    assert counter.frame_count == 2


def test_errors_while_tracing_name_the_argument() -> None:
    compiled = torch.compile(vqkernels.nearest_code, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="last dimension D"):
        compiled(torch.randn(5, 4), torch.randn(6, 3))
