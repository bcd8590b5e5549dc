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
from vqkernels.training import metrics
from vqkernels.training.demo import DemoSettings, class_rows, run_demo, smoke_settings
from vqkernels.training.loops import (
    TrainingPlan,
    WeightEMA,
    logit_normal_times,
    rectified_flow_loss,
    train_dit,
    train_vqvae,
)
from vqkernels.training.pipeline import LatentScale, Pipeline, sample_flow
from vqkernels.training.step_time import (
    OURS,
    PACKAGE,
    REFERENCE,
    StepTime,
    format_step_times,
    measure_step_times,
    with_package_quantizer,
)

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
    drawn = sample_flow(average, wanted, seed=1, guidance=1.0)
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


def test_step_times_compare_the_same_training() -> None:
    pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    model = VQVAE(TINY_VQVAE)
    images = torch.rand(20, 1, 12, 12) * 2 - 1
    model(images)
    theirs = with_package_quantizer(model)
    assert theirs is not None
    torch.manual_seed(1)
    expected = model(images)
    torch.manual_seed(1)
    out = theirs(images)
    assert torch.equal(out.indices, expected.indices)
    torch.testing.assert_close(out.loss, expected.loss)
    rows = measure_step_times(model, images, rounds=1)
    assert [row.name for row in rows] == [OURS, REFERENCE, PACKAGE]


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
        assert results["step_time_ms"][name]["whole_step"] > 0
        assert results["step_time_ms"][name]["quantizer"] > 0
