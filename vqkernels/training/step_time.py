"""How long a VQ-VAE training step takes with each implementation of the quantizer."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels.backends import use_backend
from vqkernels.models.vqvae import VQVAE

OURS = "vqkernels"
REFERENCE = "PyTorch reference"
PACKAGE = "vector-quantize-pytorch"


@dataclass(frozen=True)
class StepTime:
    """Median milliseconds; None where the package is not installed."""

    name: str
    step_ms: float | None
    quantizer_ms: float | None


def measure_step_times(model: VQVAE, images: Tensor, rounds: int = 15) -> list[StepTime]:
    """Time one training step (forward, backward, optimizer) and the quantizer's own share
    (forward, backward) for a batch of images; all versions in turn, medians over `rounds`."""
    versions: dict[str, tuple[VQVAE, Callable[[], AbstractContextManager[None]]]] = {
        OURS: (copy.deepcopy(model), contextlib.nullcontext),
        REFERENCE: (copy.deepcopy(model), lambda: use_backend("reference")),
    }
    package_model = with_package_quantizer(model)
    if package_model is not None:
        versions[PACKAGE] = (package_model, contextlib.nullcontext)

    steps = {
        name: (_training_step(version, images), _quantizer_step(version, images), backend)
        for name, (version, backend) in versions.items()
    }
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for turn in range(rounds + 2):
        for name, (step, quantizer, backend) in steps.items():
            with backend():
                elapsed = _milliseconds(step), _milliseconds(quantizer)
            if turn >= 2:  # the first rounds warm up
                times[name][0].append(elapsed[0])
                times[name][1].append(elapsed[1])

    rows = [StepTime(n, statistics.median(a), statistics.median(b)) for n, (a, b) in times.items()]
    return rows if package_model is not None else [*rows, StepTime(PACKAGE, None, None)]


def format_step_times(rows: list[StepTime], batch: int) -> str:
    width = max(len(row.name) for row in rows)
    lines = [
        f"VQ-VAE training step, {batch} images, median ms",
        f"{'quantizer':<{width}}  {'whole step':>12}  {'quantizer alone':>15}",
    ]
    for row in rows:
        if row.step_ms is None or row.quantizer_ms is None:
            lines.append(f"{row.name:<{width}}  {'not installed':>12}")
        else:
            lines.append(f"{row.name:<{width}}  {row.step_ms:>12.1f}  {row.quantizer_ms:>15.2f}")
    return "\n".join(lines)


def with_package_quantizer(model: VQVAE) -> VQVAE | None:
    """A copy of the model around vector-quantize-pytorch's layer, or None without the package."""
    try:
        from vector_quantize_pytorch import VectorQuantize as PackageVectorQuantize
    except ImportError:
        return None
    config = model.config
    quantizer = PackageVectorQuantize(
        config.codebook_dim,
        config.codebook_size,
        decay=config.decay,
        commitment_weight=config.commitment_weight,
        threshold_ema_dead_code=config.threshold_ema_dead_code,
        rotation_trick=False,
        accept_image_fmap=True,
    )
    package_model = copy.deepcopy(model)
    quantizer.load_state_dict(model.quantizer.state_dict())
    package_model.quantizer = quantizer
    return package_model


def _training_step(model: VQVAE, images: Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        loss = model(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _quantizer_step(model: VQVAE, images: Tensor) -> Callable[[], None]:
    with torch.no_grad():
        latents = model.encoder(images)

    def step() -> None:
        x = latents.requires_grad_()
        quantized, _, loss = model.quantizer(x)
        torch.autograd.grad(quantized.sum() + loss, x)

    return step


def _milliseconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)
