"""What the demo measures."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vqkernels._optional import require
from vqkernels.models.vqvae import VQVAE
from vqkernels.training.data import ImageData

_BATCH = 250
_CLASSIFIER_IMAGES = 5000


@torch.no_grad()
def tokenize(model: VQVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """(quantized latents `[N, d, h, w]`, indices `[N, h, w]`) of images, in eval mode."""
    was_training = model.training
    model.eval()
    parts = [model.encode(batch)[:2] for batch in images.split(_BATCH)]
    model.train(was_training)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


@torch.no_grad()
def decode(model: VQVAE, quantized: Tensor) -> Tensor:
    """Images in [-1, 1]."""
    images = [model.decode(batch) for batch in quantized.split(_BATCH)]
    return torch.cat(images).clamp(-1, 1)


def reconstruction_psnr(model: VQVAE, images: Tensor) -> float:
    return psnr(decode(model, tokenize(model, images)[0]), images)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], from the mean over all of them."""
    error = ((a - b) / 2).square().mean().item()
    return -10 * math.log10(max(error, 1e-12))


def codebook_use(indices: Tensor, codebook_size: int) -> tuple[float, float]:
    """(share of codes used, perplexity = exp(entropy) of their frequencies)."""
    share = indices.flatten().bincount(minlength=codebook_size).double() / indices.numel()
    return (share > 0).double().mean().item(), torch.special.entr(share).sum().exp().item()


def mean_nearest_distance(images: Tensor, others: Tensor) -> float:
    """Mean over `images` of the distance to the nearest of `others`: the root mean square
    difference of pixels in [0, 1]."""
    pixels = images[0].numel()
    nearest = torch.cdist(images.flatten(1), others.flatten(1)).amin(1)
    return (nearest.mean() / 2 / math.sqrt(pixels)).item()


class Classifier:
    """A support-vector classifier of raw pixels, fitted on real training images."""

    def __init__(self, training: ImageData) -> None:
        self._svc: Any = require("sklearn.svm").SVC(C=10.0, gamma="scale")
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(training), generator=generator)[:_CLASSIFIER_IMAGES]
        self._svc.fit(training.images[chosen].flatten(1).numpy(), training.labels[chosen].numpy())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        return float(self._svc.score(images.flatten(1).numpy(), labels.numpy()))
