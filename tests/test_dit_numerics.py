"""A whole DiT on the kernels against the same model in float64, and training on either backend."""

from __future__ import annotations

import copy

import pytest
import torch
from _helpers.models import randomized, small_dit
from _helpers.precision import assert_as_good_as_eager
from torch import Tensor, nn

from vqkernels import use_backend
from vqkernels.models.dit import DiT
from vqkernels.nn import AdaLayerNormZero, DiTBlock
from vqkernels.ops.ada_layer_norm import ada_layer_norm
from vqkernels.ops.modulated_attention import modulated_attention
from vqkernels.ops.modulated_mlp import modulated_mlp


def output_and_gradients(
    model: DiT, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> dict[str, Tensor]:
    x, t, y = inputs
    x = x.detach().requires_grad_()
    out = model(x, t, y)
    named = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(out, list(named.values()), grad)
    return {"out": out, **dict(zip(named, found, strict=True))}


@pytest.mark.parametrize("head_dim", [6, 16, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_dit_and_its_gradients(native_cpu: None, dtype: torch.dtype, head_dim: int) -> None:
    """Judged by how far the same model on the reference is from float64 in the same dtype."""
    model = small_dit(hidden_size=2 * head_dim, num_heads=2, depth=3, input_size=10)
    model = randomized(model, scale=0.5 * head_dim**-0.5).to(dtype)
    x = torch.randn(3, 3, 10, 10).to(dtype)
    t, y = torch.tensor([0.0, 17.5, 999.0]), torch.tensor([0, 4, 5])
    grad = torch.randn(3, 3, 10, 10).to(dtype)
    ours = output_and_gradients(model, (x, t, y), grad)
    with use_backend("reference"):
        plain = output_and_gradients(model, (x, t, y), grad)
        wide = copy.deepcopy(model).double()
        exact = output_and_gradients(wide, (x.double(), t.double(), y), grad.double())
    for name, true in exact.items():
        assert true.abs().max() > 1e-3, f"{name} says nothing"
        assert_as_good_as_eager(ours[name], plain[name], true.detach(), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_training_steps_agree_with_the_reference(
    native_cpu: None, dtype: torch.dtype
) -> None:
    """Under autocast for bf16, as people train; every parameter starts at random."""
    torch.manual_seed(0)
    first = randomized(small_dit(class_dropout_prob=0.0), scale=0.15).train()
    x, y = torch.randn(8, 3, 6, 6), torch.randint(0, 5, (8,))
    t, noise = torch.rand(8), torch.randn(8, 3, 6, 6)
    mixed = x + t[:, None, None, None] * (noise - x)
    losses: dict[str, list[float]] = {}
    for backend in ("cpu", "reference"):
        model = copy.deepcopy(first)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[backend] = []
        for _ in range(50):
            with use_backend(backend), torch.autocast("cpu", enabled=dtype == torch.bfloat16):
                loss = (model(mixed, 1000 * t, y).float() - (noise - x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    apart = (1e-4 if dtype == torch.float32 else 1e-2) * losses["reference"][0]
    assert losses["cpu"] == pytest.approx(losses["reference"], rel=0, abs=apart)
    assert losses["cpu"][-1] < 0.5 * losses["cpu"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_is_its_two_branches(backend: str, dtype: torch.dtype) -> None:
    block = randomized(DiTBlock(24, 3)).to(dtype)
    x, c = torch.randn(2, 9, 24).to(dtype), torch.randn(2, 24).to(dtype)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c).chunk(6, -1)
    h = modulated_attention(
        x, shift=shift, scale=scale, gate=gate, num_heads=3,
        qkv_weight=block.attn.qkv.weight, qkv_bias=block.attn.qkv.bias,
        proj_weight=block.attn.proj.weight, proj_bias=block.attn.proj.bias,
    )  # fmt: skip
    h = modulated_mlp(
        h, shift=shift_mlp, scale=scale_mlp, gate=gate_mlp,
        fc1_weight=block.mlp.fc1.weight, fc1_bias=block.mlp.fc1.bias,
        fc2_weight=block.mlp.fc2.weight, fc2_bias=block.mlp.fc2.bias,
    )  # fmt: skip
    torch.testing.assert_close(block(x, c), h)


@pytest.mark.parametrize("bias", [True, False])
def test_ada_layer_norm_zero(bias: bool) -> None:
    layer = randomized(AdaLayerNormZero(12, norm_type="fp32_layer_norm", bias=bias))
    names = ["linear.weight", "linear.bias"] if bias else ["linear.weight"]
    assert list(layer.state_dict()) == names
    x, emb = torch.randn(2, 5, 12), torch.randn(2, 12)
    found = layer(x, emb=emb)
    shift, scale, *others = layer.linear(nn.functional.silu(emb)).chunk(6, dim=1)
    expected = (ada_layer_norm(x, shift=shift, scale=scale), *others)
    assert len(found) == 5
    for mine, true in zip(found, expected, strict=True):
        assert torch.equal(mine, true)


def test_ada_layer_norm_zero_names_what_it_lacks() -> None:
    with pytest.raises(NotImplementedError, match="num_embeddings is not supported, got 1000"):
        AdaLayerNormZero(12, 1000)
    with pytest.raises(ValueError, match="norm_type must be"):
        AdaLayerNormZero(12, norm_type="rms")
    with pytest.raises(ValueError, match="emb must be given"):
        AdaLayerNormZero(12)(torch.zeros(2, 5, 12))
