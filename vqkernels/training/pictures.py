"""The demo's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqkernels._optional import require
from vqkernels.training.loops import History

_GAP = 2
_SHORTEST_SIDE = 56


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Images `[N, C, S, S]` in [-1, 1], row by row."""
    count, channels, side, _ = images.shape
    rows = -(-count // columns)
    cell = side + _GAP
    canvas = torch.zeros(channels, rows * cell + _GAP, columns * cell + _GAP, dtype=torch.uint8)
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte()
    for i, picture in enumerate(pixels):
        top, left = i // columns * cell + _GAP, i % columns * cell + _GAP
        canvas[:, top : top + side, left : left + side] = picture
    array = canvas[0].numpy() if channels == 1 else canvas.permute(1, 2, 0).numpy()
    picture = require("PIL.Image").fromarray(array)
    zoom = max(1, round(_SHORTEST_SIDE / side))
    size = (picture.width * zoom, picture.height * zoom)
    picture.resize(size, resample=0).save(path)


def save_reconstructions(originals: Tensor, reconstructions: Tensor, path: Path) -> None:
    """Pairs of rows: originals above their reconstructions."""
    columns = min(16, len(originals))
    bands = max(1, min(4, len(originals) // columns))
    pairs = [
        part
        for band in range(bands)
        for part in (
            originals[band * columns : (band + 1) * columns],
            reconstructions[band * columns : (band + 1) * columns],
        )
    ]
    save_grid(torch.cat(pairs), columns, path)


def save_curves(vqvae: History, dit: History, path: Path) -> None:
    matplotlib = require("matplotlib")
    matplotlib.use("Agg")
    plt = require("matplotlib.pyplot")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")

    _draw(left, vqvae, "reconstruction_loss")
    left.set(title="VQ-VAE", xlabel="step", ylabel="mean squared error", yscale="log")

    reports = [row for row in vqvae if "held_out_psnr" in row]
    steps = [row["step"] for row in reports]
    middle.plot(steps, [row["held_out_psnr"] for row in reports], "o-", label="PSNR")
    middle.set(title="held-out reconstruction", xlabel="step", ylabel="PSNR (dB)")
    usage = middle.twinx()
    usage.plot(steps, [100 * row["codebook_usage"] for row in reports], "s--", color="C1")
    usage.set(ylabel="codes used (%), dashed", ylim=(0, 105))

    _draw(right, dit, "loss")
    right.set(title="Diffusion Transformer", xlabel="step", ylabel="velocity error")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Any, history: History, name: str) -> None:
    values = torch.tensor([row[name] for row in history])
    steps = [row["step"] for row in history]
    window = max(1, len(values) // 40)
    smooth = values.unfold(0, window, 1).mean(-1)
    axis.plot(steps, values, alpha=0.3, linewidth=0.8)
    axis.plot(steps[window - 1 :], smooth, color="C0")
