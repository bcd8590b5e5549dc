"""The main job, end to end: tokenizer, transformer, samples, pictures and numbers."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqkernels._optional import require
from vqkernels.models.dit import DiT
from vqkernels.models.vqvae import VQVAE, VQVAEConfig
from vqkernels.training import metrics
from vqkernels.training.data import ImageData, load_images, split
from vqkernels.training.loops import History, TrainingPlan, train_dit, train_vqvae
from vqkernels.training.pictures import save_curves, save_grid, save_reconstructions
from vqkernels.training.pipeline import LatentScale, Pipeline
from vqkernels.training.step_time import format_step_times, measure_step_times

_NEEDED = ("mlxtend", "sklearn", "matplotlib", "PIL", "safetensors", "tqdm")
_MOST_ROWS = 10


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides what the demo does.

    Attributes:
        data: see `load_images`.
        image_size: see `load_images`.
        out: folder for the results, made if it is missing.
        seed: of initial weights, batches, noise and samples.
        vqvae, dit: how long to train each model.
        samples: how many images to sample.
        sampler_steps, guidance: see `sample_flow`.
        timing_rounds: repetitions behind each median of the step-time table.
    """

    data: Path | None = None
    image_size: int | None = None
    out: Path = Path("out/demo")
    seed: int = 0
    vqvae: TrainingPlan = field(default_factory=lambda: TrainingPlan(700, learning_rate=2e-3))
    dit: TrainingPlan = field(default_factory=lambda: TrainingPlan(1000, learning_rate=3e-3))
    samples: int = 200
    sampler_steps: int = 25
    guidance: float = 2.0
    timing_rounds: int = 15


def smoke_settings(settings: DemoSettings) -> DemoSettings:
    """The same path in seconds: every stage runs, nothing is learned."""
    return DemoSettings(
        data=settings.data,
        image_size=settings.image_size,
        out=settings.out,
        seed=settings.seed,
        vqvae=TrainingPlan(10, batch_size=32, learning_rate=2e-3),
        dit=TrainingPlan(10, batch_size=32),
        samples=20,
        sampler_steps=3,
        timing_rounds=2,
    )


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Train, sample, measure; write everything to `settings.out` and return the metrics."""
    for module in _NEEDED:
        require(module)
    start = time.perf_counter()
    training, held_out = load_and_split(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    pipeline, histories = train_pipeline(training, held_out, settings)
    pipeline.save(settings.out)

    labels = class_rows(len(training.class_names), settings.samples)
    samples = pipeline.sample(
        labels,
        seed=settings.seed,
        steps=settings.sampler_steps,
        guidance=settings.guidance,
        progress=True,
    )
    print("measuring ...")
    results = evaluate(pipeline, training, held_out, samples, labels)
    draw(pipeline, held_out, samples, labels, histories, settings.out)

    batch = training.images[: settings.vqvae.batch_size]
    rows = measure_step_times(pipeline.vqvae, batch, settings.timing_rounds)
    results["step_time_ms"] = {
        row.name: {"whole_step": row.step_ms, "quantizer": row.quantizer_ms} for row in rows
    }
    results["seconds"] = round(time.perf_counter() - start, 1)
    results["threads"] = torch.get_num_threads()
    (settings.out / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")

    print(f"\n{summary(results)}\n\n{format_step_times(rows, len(batch))}\n")
    print(f"{results['seconds']:.0f} s; results in {settings.out}/")
    return results


def load_and_split(settings: DemoSettings) -> tuple[ImageData, ImageData]:
    training, held_out = split(load_images(settings.data, settings.image_size))
    if len(held_out) == 0:
        raise ValueError("data must hold at least 3 images of some class, to hold one out")
    print(
        f"{training.source}: {len(training)} to train, {len(held_out)} held out, "
        f"{len(training.class_names)} class(es), {list(training.images.shape[1:])}"
    )
    return training, held_out


def train_pipeline(
    training: ImageData, held_out: ImageData, settings: DemoSettings
) -> tuple[Pipeline, tuple[History, History]]:
    """The tokenizer on images, then the transformer on its codes."""
    torch.manual_seed(settings.seed)
    config = VQVAEConfig(in_channels=training.images.shape[1])
    vqvae = VQVAE(config)
    vqvae_history = train_vqvae(
        vqvae, training.images, held_out.images, settings.vqvae, seed=settings.seed
    )

    latents, _ = metrics.tokenize(vqvae, training.images)
    scale = LatentScale.of(latents)
    arguments = dit_arguments(latents, len(training.class_names))
    dit, dit_history = train_dit(
        DiT(**arguments),
        scale.standardize(latents),
        training.labels,
        settings.dit,
        seed=settings.seed,
    )
    pipeline = Pipeline(vqvae, dit, arguments, scale, training.class_names)
    return pipeline, (vqvae_history, dit_history)


def dit_arguments(latents: Tensor, num_classes: int) -> dict[str, Any]:
    side = latents.shape[-1]
    return {
        "input_size": side,
        "patch_size": 1 if side <= 16 else 2,
        "in_channels": latents.shape[1],
        "hidden_size": 128,
        "depth": 4,
        "num_heads": 4,
        "num_classes": num_classes,
        "learn_sigma": False,
    }


def class_rows(num_classes: int, samples: int) -> Tensor:
    """Labels of a picture with one row a class (at most ten): `samples` in all, rounded down to
    whole rows."""
    rows = min(num_classes, _MOST_ROWS)
    return torch.arange(rows).repeat_interleave(max(1, samples // rows))


def evaluate(
    pipeline: Pipeline, training: ImageData, held_out: ImageData, samples: Tensor, labels: Tensor
) -> dict[str, Any]:
    """The numbers of metrics.json; distances are root mean square differences of pixels in
    [0, 1]."""
    vqvae = pipeline.vqvae
    latents, indices = metrics.tokenize(vqvae, held_out.images)
    usage, perplexity = metrics.codebook_use(indices, vqvae.config.codebook_size)
    results: dict[str, Any] = {
        "held_out_psnr_db": metrics.psnr(metrics.decode(vqvae, latents), held_out.images),
        "codebook_size": vqvae.config.codebook_size,
        "held_out_codebook_usage": usage,
        "held_out_codebook_perplexity": perplexity,
        "samples": len(samples),
        "sample_distance_to_training": metrics.mean_nearest_distance(samples, training.images),
        "held_out_distance_to_training": metrics.mean_nearest_distance(
            held_out.images, training.images
        ),
    }
    if len(training.class_names) > 1:
        classifier = metrics.Classifier(training)
        results["classifier_held_out_accuracy"] = classifier.accuracy(
            held_out.images, held_out.labels
        )
        results["classifier_sample_accuracy"] = classifier.accuracy(samples, labels)
    return results


def draw(
    pipeline: Pipeline,
    held_out: ImageData,
    samples: Tensor,
    labels: Tensor,
    histories: tuple[History, History],
    out: Path,
) -> None:
    shown = torch.linspace(0, len(held_out) - 1, min(64, len(held_out))).long()
    originals = held_out.images[shown]
    rebuilt = metrics.decode(pipeline.vqvae, metrics.tokenize(pipeline.vqvae, originals)[0])
    save_reconstructions(originals, rebuilt, out / "reconstructions.png")
    columns = len(labels) // len(labels.unique())
    save_grid(samples, min(columns, 20), out / "samples.png")
    save_curves(*histories, out / "curves.png")


def summary(results: dict[str, Any]) -> str:
    lines = [
        f"held-out reconstruction     {results['held_out_psnr_db']:.2f} dB",
        f"codes used, held-out images {results['held_out_codebook_usage']:.0%} of "
        f"{results['codebook_size']}, perplexity {results['held_out_codebook_perplexity']:.0f}",
        f"nearest training image      {results['sample_distance_to_training']:.3f} from a sample, "
        f"{results['held_out_distance_to_training']:.3f} from a held-out image",
    ]
    if "classifier_sample_accuracy" in results:
        lines.append(
            f"classifier on real digits   {results['classifier_sample_accuracy']:.1%} of "
            f"{results['samples']} samples recognised, "
            f"{results['classifier_held_out_accuracy']:.1%} of held-out images"
        )
    return "\n".join(lines)
