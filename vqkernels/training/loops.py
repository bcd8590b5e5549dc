"""The two training loops: a VQ-VAE on images, then a rectified flow on its latents."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vqkernels._optional import progress_bar
from vqkernels.models.dit import DiT
from vqkernels.models.vqvae import VQVAE
from vqkernels.ops.diffuse import diffuse
from vqkernels.training.metrics import reconstruction_psnr

History = list[dict[str, float]]

TIME_SCALE = 1000.0  # models see t * TIME_SCALE, as `FlowMatchEulerDiscreteScheduler` has it


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train one model."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 50


def train_vqvae(
    model: VQVAE, images: Tensor, held_out: Tensor, plan: TrainingPlan, *, seed: int = 0
) -> History:
    """Train in place on images `[N, C, H, W]` in [-1, 1].

    Returns the history: `step`, `loss` and `reconstruction_loss`, and ten times on the way
    `held_out_psnr` (dB) and `codebook_usage` (share of codes chosen since the last report).
    """
    optimizer = AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0)
    schedule = _warmup_then_cosine(optimizer, plan)
    history: History = []
    report_every = max(1, plan.steps // 10)
    model.train()
    bar = progress_bar(_batches(len(images), plan, seed), "VQ-VAE")
    for step, batch in enumerate(bar, start=1):
        out = model(images[batch])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        schedule.step()

        row = {
            "step": step,
            "loss": out.loss.item(),
            "reconstruction_loss": out.reconstruction_loss.item(),
        }
        if step % report_every == 0 or step == plan.steps:
            row["held_out_psnr"] = reconstruction_psnr(model, held_out)
            row["codebook_usage"] = model.quantizer.usage.item()
            model.quantizer.reset_usage()
            bar.set_postfix_str(
                f"loss {row['loss']:.4f}, held-out {row['held_out_psnr']:.1f} dB, "
                f"codes {row['codebook_usage']:.0%}"
            )
        history.append(row)
    model.eval()
    return history


def train_dit(
    model: DiT, latents: Tensor, labels: Tensor, plan: TrainingPlan, *, seed: int = 0
) -> tuple[DiT, History]:
    """Train in place on standardized latents `[N, C, H, W]` with labels `[N]`.

    Returns (the moving average of the weights, as a model to sample from, history of `step` and
    `loss`).
    """
    optimizer = AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0)
    schedule = _warmup_then_cosine(optimizer, plan)
    average = WeightEMA(model)
    generator = torch.Generator().manual_seed(seed)
    history: History = []
    model.train()
    bar = progress_bar(_batches(len(latents), plan, seed), "DiT")
    for step, batch in enumerate(bar, start=1):
        t = logit_normal_times(plan.batch_size, generator)
        loss = rectified_flow_loss(
            model, latents[batch], labels[batch], t, seed=seed * 2**32 + step
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update(model)

        history.append({"step": step, "loss": loss.item()})
        if step % 20 == 0:
            recent = [row["loss"] for row in history[-100:]]
            bar.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}")
    return average.model.eval(), history


def rectified_flow_loss(
    model: nn.Module, x: Tensor, labels: Tensor, t: Tensor, *, seed: int | Tensor
) -> Tensor:
    """mean((v(x_t, t) - (z - x))^2) with x_t = (1 - t) x + t z and noise z from `seed`.

    x is `[B, C, H, W]`, t `[B]` in (0, 1). Source: Liu et al. 2022, arXiv:2209.03003.
    """
    x_t, velocity = diffuse(x, 1 - t, t, seed=seed, target="flow")
    predicted = model(x_t, t * TIME_SCALE, labels)
    return (predicted - velocity).square().mean()


def logit_normal_times(count: int, generator: torch.Generator) -> Tensor:
    """Times `[count]` in (0, 1), sigmoid of a standard normal: most training in the middle, where
    the velocity is hard to tell. Source: Esser et al. 2024, arXiv:2403.03206, section 3.1."""
    return torch.randn(count, generator=generator).sigmoid()


class WeightEMA:
    """A moving average of a model's weights.

    The decay grows from 0.1 to `decay` over the first steps, so that a short run forgets its
    start.
    """

    def __init__(self, model: DiT, decay: float = 0.999) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 1 - decay)


def _batches(count: int, plan: TrainingPlan, seed: int) -> list[Tensor]:
    """Index batches `[batch_size]` for every step: shuffled passes over the data."""
    generator = torch.Generator().manual_seed(seed)
    needed = plan.steps * plan.batch_size
    passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    return list(torch.cat(passes)[:needed].split(plan.batch_size))


def _warmup_then_cosine(optimizer: Optimizer, plan: TrainingPlan) -> LambdaLR:
    warmup = min(plan.warmup, max(1, plan.steps // 10))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / plan.steps))

    return LambdaLR(optimizer, factor)
