"""VQVAE and DiT: names, shapes, initialization, guidance, sampling."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from _helpers.models import randomized, small_dit
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.models.dit import DiT, DiT_models
from vqkernels.models.vqvae import VQVAE, VQVAEConfig
from vqkernels.nn.embedders import LabelEmbedder, TimestepEmbedder, sincos_position_embedding
from vqkernels.ops.diffuse import diffuse
from vqkernels.training.loops import TIME_SCALE
from vqkernels.training.pipeline import sample_flow


def test_dit_parameter_names_are_those_of_facebookresearch_dit() -> None:
    block = [
        f"{part}.{kind}"
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        for kind in ("weight", "bias")
    ]
    expected = {
        "pos_embed",
        "x_embedder.proj.weight", "x_embedder.proj.bias",
        "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias",
        "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias",
        "y_embedder.embedding_table.weight",
        *(f"blocks.{i}.{name}" for i in range(2) for name in block),
        "final_layer.linear.weight", "final_layer.linear.bias",
        "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias",
    }  # fmt: skip
    model = small_dit()
    assert set(model.state_dict()) == expected
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["pos_embed"] == (1, 9, 24)
    assert shapes["x_embedder.proj.weight"] == (24, 3, 2, 2)
    assert shapes["t_embedder.mlp.0.weight"] == (24, 256)
    assert shapes["y_embedder.embedding_table.weight"] == (6, 24)
    assert shapes["blocks.0.attn.qkv.weight"] == (72, 24)
    assert shapes["blocks.0.mlp.fc1.weight"] == (96, 24)
    assert shapes["blocks.0.adaLN_modulation.1.weight"] == (144, 24)
    assert shapes["final_layer.linear.weight"] == (12, 24)
    assert shapes["final_layer.adaLN_modulation.1.weight"] == (48, 24)
    assert not model.pos_embed.requires_grad


# Parameters in millions, from table 4 of arXiv:2212.09748.
PUBLISHED_SIZES = {"DiT-S/2": 33, "DiT-B/4": 130, "DiT-L/8": 459, "DiT-XL/2": 675}


@pytest.mark.parametrize("name", list(PUBLISHED_SIZES))
def test_dit_models_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = DiT_models[name]()
    millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert millions == pytest.approx(PUBLISHED_SIZES[name], rel=0.012)
    assert model.out_channels == 8


def test_dit_models_lists_twelve() -> None:
    names = {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
    assert set(DiT_models) == names


def plain_dit(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiT written out from the paper with torch's own layers, in float64."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    p, width = model.patch_size, w["pos_embed"].shape[-1]

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        mean, var = value.mean(-1, keepdim=True), value.var(-1, keepdim=True, correction=0)
        return (value - mean) / (var + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]

    h = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
    side = h.shape[-1]
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    angles = t.double()[:, None] * frequencies
    c = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
    c = linear("t_embedder.mlp.2", F.silu(c)) + w["y_embedder.embedding_table.weight"][y]
    for i in range(len(model.blocks)):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(
            f"{name}.adaLN_modulation.1", F.silu(c)
        ).chunk(6, 1)
        qkv = linear(f"{name}.attn.qkv", modulated(h, shift1, scale1))
        q, k, v = (
            part.unflatten(-1, (model.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
        )
        weights = (q @ k.mT / math.sqrt(width // model.num_heads)).softmax(-1)
        attended = (weights @ v).transpose(1, 2).flatten(2)
        h = h + gate1[:, None] * linear(f"{name}.attn.proj", attended)
        hidden = F.gelu(linear(f"{name}.mlp.fc1", modulated(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * linear(f"{name}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    out = linear("final_layer.linear", modulated(h, shift, scale))

    image = out.new_zeros(len(x), model.out_channels, side * p, side * p)
    for token in range(side * side):
        row, column = token // side * p, token % side * p
        patch = out[:, token].view(-1, p, p, model.out_channels).permute(0, 3, 1, 2)
        image[:, :, row : row + p, column : column + p] = patch
    return image


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_dit_follows_the_paper(learn_sigma: bool) -> None:
    model = randomized(small_dit(learn_sigma=learn_sigma))
    assert isinstance(model, DiT)
    x, t, y = torch.randn(3, 3, 6, 6), torch.tensor([0.0, 17.5, 999.0]), torch.tensor([0, 4, 5])
    out = model(x, t, y)
    assert out.shape == (3, 6 if learn_sigma else 3, 6, 6)
    torch.testing.assert_close(out.double(), plain_dit(model, x, t, y), rtol=1e-3, atol=1e-4)


def test_dit_starts_as_zero_and_learns_every_parameter() -> None:
    torch.manual_seed(0)
    model = small_dit()
    x, t, y = torch.randn(4, 3, 6, 6), torch.rand(4) * 1000, torch.randint(0, 5, (4,))
    assert (model(x, t, y) == 0).all()
    tokens = torch.randn(4, 9, 24)
    assert torch.equal(model.blocks[0](tokens, torch.randn(4, 24)), tokens)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(4):  # gates open one layer of zeros a step
        (model(x, t, y) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    unmoved = [
        n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[n])
    ]
    assert unmoved == []


def test_position_embedding_separates_rows_and_columns() -> None:
    embedding = sincos_position_embedding(24, 5).view(5, 5, 24)
    assert embedding.dtype == torch.float32
    column, row = embedding[..., :12], embedding[..., 12:]
    assert (column == column[:1]).all()
    assert (row == row[:, :1]).all()
    angles = 3 * 10000.0 ** -(torch.arange(6) / 6)
    expected = torch.cat([angles.sin(), angles.cos()])
    torch.testing.assert_close(column[0, 3], expected)
    torch.testing.assert_close(row[3, 0], expected)


def test_label_dropout() -> None:
    torch.manual_seed(0)
    embedder = LabelEmbedder(4, 8, dropout_prob=0.25)
    labels = torch.arange(4).repeat(2000)
    table = embedder.embedding_table.weight
    assert torch.equal(embedder(labels, train=False), table[labels])
    dropped = (embedder(labels, train=True) == table[4]).all(-1).float().mean()
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 8000)
    forced = torch.tensor([1, 0, 1, 0])
    expected = table[torch.tensor([4, 1, 4, 3])]
    assert torch.equal(embedder(torch.arange(4), train=False, force_drop_ids=forced), expected)
    assert LabelEmbedder(4, 8, dropout_prob=0).embedding_table.weight.shape == (4, 8)


def test_timestep_embedder_follows_its_weights_dtype() -> None:
    embedder = TimestepEmbedder(16).bfloat16()
    assert embedder(torch.tensor([3.0])).dtype == torch.bfloat16


@pytest.mark.parametrize(("guided_channels", "guided"), [(None, 3), (2, 2)])
def test_guidance_mixes_the_two_predictions(guided_channels: int | None, guided: int) -> None:
    model = randomized(small_dit(learn_sigma=True))
    assert isinstance(model, DiT)
    x, t, y = torch.randn(2, 3, 6, 6), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, 5))
    assert (cond - uncond).abs().max() > 0.1
    both = model.forward_with_cfg(
        torch.cat([x, torch.full_like(x, torch.nan)]),
        torch.cat([t, t]),
        torch.cat([y, torch.full_like(y, 5)]),
        3.5,
        guided_channels,
    )
    expected = uncond[:, :guided] + 3.5 * (cond[:, :guided] - uncond[:, :guided])
    for half, own in ((both[:2], cond), (both[2:], uncond)):
        torch.testing.assert_close(half[:, :guided], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(half[:, guided:], own[:, guided:], rtol=1e-3, atol=1e-3)


class StraightPaths(nn.Module):
    """A model whose velocity is that of straight paths to one image a label; the "no class"
    path leads to zero."""

    num_classes, learn_sigma = 2, False

    def __init__(self) -> None:
        super().__init__()
        self.targets = torch.stack([torch.full((3, 2, 2), v) for v in (1.0, -2.0, 0.0)])
        self.y_embedder = LabelEmbedder(2, 1, dropout_prob=0.1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (x - self.targets[y]) / (t / TIME_SCALE)[:, None, None, None]

    in_channels, input_size = 3, 2


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_euler_sampler_is_exact_on_straight_paths(steps: int, guidance: float) -> None:
    model = StraightPaths()
    labels = torch.tensor([0, 1, 1])
    samples = sample_flow(model, labels, seed=0, steps=steps, guidance=guidance)  # type: ignore[arg-type]
    if guidance == 1:
        torch.testing.assert_close(samples, model.targets[labels], rtol=1e-5, atol=1e-5)
    elif steps == 1:  # one step to the guided target: 2 * target - 0
        torch.testing.assert_close(samples, 2 * model.targets[labels], rtol=1e-5, atol=1e-5)


def test_samples_do_not_depend_on_their_batch() -> None:
    model = randomized(small_dit())
    assert isinstance(model, DiT)
    labels = torch.tensor([0, 3, 2, 4])
    together = sample_flow(model, labels, seed=9, steps=4)
    alone = sample_flow(model, labels[2:3], seed=9, sample_ids=torch.tensor([2]), steps=4)
    torch.testing.assert_close(alone[0], together[2], rtol=1e-4, atol=1e-4)


def test_sampler_names_bad_input() -> None:
    noise, labels = torch.randn(2, 3, 6, 6), torch.tensor([0, 1])
    model = small_dit()
    with pytest.raises(ValueError, match="steps must be at least 1"):
        sample_flow(model, labels, seed=0, steps=0)
    with pytest.raises(ValueError, match="labels must be"):
        sample_flow(model, labels[:, None], seed=0)
    with pytest.raises(ValueError, match="labels must lie in"):
        sample_flow(model, labels + 5, seed=0)
    with pytest.raises(ValueError, match="label dropout"):
        sample_flow(small_dit(class_dropout_prob=0.0), labels, seed=0)
    with pytest.raises(ValueError, match="learn_sigma=False"):
        sample_flow(small_dit(learn_sigma=True), labels, seed=0)
    with pytest.raises(ValueError, match="x must be"):
        model(noise[..., :4], torch.zeros(2), labels)
    with pytest.raises(ValueError, match="input_size must be a multiple"):
        small_dit(input_size=7)
    with pytest.raises(ValueError, match="hidden_size must be a multiple"):
        small_dit(hidden_size=26)


SMALL_VQVAE = VQVAEConfig(in_channels=3, hidden_channels=16, num_residual_blocks=1, codebook_size=8)


def test_vqvae_shapes_and_round_trip() -> None:
    torch.manual_seed(0)
    model = VQVAE(SMALL_VQVAE)
    images = torch.rand(5, 3, 12, 20) * 2 - 1
    out = model(images)
    assert out.reconstruction.shape == images.shape
    assert out.indices.shape == (5, 3, 5)
    assert out.loss > out.reconstruction_loss
    torch.testing.assert_close(out.reconstruction_loss, F.mse_loss(out.reconstruction, images))

    model.eval()
    quantized, indices, commitment = model.encode(images)
    assert commitment == 0
    torch.testing.assert_close(model.decode_indices(indices), model.decode(quantized))
    assert torch.equal(model.snap(quantized), quantized)
    nearby = quantized + 1e-4 * torch.randn_like(quantized)
    assert torch.equal(model.snap(nearby), quantized)


def test_vqvae_snap_learns_nothing() -> None:
    torch.manual_seed(0)
    model = VQVAE(SMALL_VQVAE)
    model(torch.rand(5, 3, 12, 12))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.snap(torch.randn(5, 4, 3, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_vqvae_gradient_reaches_every_parameter() -> None:
    model = VQVAE(SMALL_VQVAE)
    model(torch.rand(5, 3, 12, 12)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("shape", [(5, 1, 12, 12), (5, 3, 12, 13), (3, 12, 12)])
def test_vqvae_names_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]"):
        VQVAE(SMALL_VQVAE)(torch.zeros(shape))


def test_vqvae_downsampling() -> None:
    for halvings in (1, 2, 3):
        config = VQVAEConfig(hidden_channels=8, num_downsamples=halvings, codebook_size=4)
        assert config.downsampling == 2**halvings
        out = VQVAE(config)(torch.rand(2, 1, 16, 16))
        assert out.indices.shape == (2, 16 // 2**halvings, 16 // 2**halvings)
        assert out.reconstruction.shape == (2, 1, 16, 16)


def test_compiled_dit_trains_as_eager_with_changing_seeds() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = small_dit(class_dropout_prob=0.0)
    for parameter in eager.parameters():
        nn.init.normal_(parameter, std=0.2)
    compiled = copy.deepcopy(eager)
    x, y = torch.randn(4, 3, 6, 6), torch.randint(0, 5, (4,))

    def loss_of(model: DiT, t: Tensor, seed: Tensor) -> Tensor:
        x_t, velocity = diffuse(x, 1 - t, t, seed=seed, target="flow")
        return (model(x_t, t * TIME_SCALE, y) - velocity).square().mean()

    fast = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (eager, compiled)]
    for step in range(10):
        t, seed = torch.rand(4), torch.tensor(1000 + step)
        losses = []
        for model, function, optimizer in zip(
            (eager, compiled), (loss_of, fast), optimizers, strict=True
        ):
            optimizer.zero_grad()
            losses.append(function(model, t, seed))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_dit_under_autocast() -> None:
    model = randomized(small_dit())
    x, t, y = torch.randn(2, 3, 6, 6), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    exact = model.double()(x.double(), t, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.float()(x, t, y)
    error = (out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.03
