"""A trained tokenizer and Diffusion Transformer together: sample, save, load."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels._optional import require
from vqkernels.models.dit import DiT
from vqkernels.models.vqvae import VQVAE, VQVAEConfig
from vqkernels.schedulers.flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from vqkernels.schedulers.sampling import sample
from vqkernels.training.metrics import decode

VQVAE_FILE = "vqvae.safetensors"
DIT_FILE = "dit.safetensors"


@dataclass(frozen=True)
class LatentScale:
    """Mean and standard deviation of each latent channel over the training set."""

    mean: list[float]
    std: list[float]

    @staticmethod
    def of(latents: Tensor) -> LatentScale:
        """Of latents `[N, C, H, W]`."""
        return LatentScale(
            latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).clamp(min=1e-6).tolist()
        )

    def standardize(self, latents: Tensor) -> Tensor:
        return (latents - _per_channel(self.mean, latents)) / _per_channel(self.std, latents)

    def restore(self, standardized: Tensor) -> Tensor:
        return standardized * _per_channel(self.std, standardized) + _per_channel(
            self.mean, standardized
        )


def sample_flow(
    model: DiT,
    labels: Tensor,
    *,
    seed: int,
    sample_ids: Tensor | None = None,
    steps: int = 25,
    guidance: float = 2.0,
    progress: bool = False,
) -> Tensor:
    """Follow a rectified flow from noise to data in equal Euler steps, guided towards labels.

    The model predicts the velocity z - x of the straight path from data x to noise z (Liu et al.
    2022, arXiv:2209.03003).

    Args:
        model: predicts velocities, in eval mode.
        labels: int64 classes `[B]`.
        seed, sample_ids: see `vqkernels.schedulers.sample`.
        steps: number of model evaluations.
        guidance: 1 follows the conditional velocity; otherwise the model was trained with label
            dropout.
        progress: show a progress bar.

    Returns:
        `[B, C, S, S]` for the model's C channels and input size S.

    Raises:
        ValueError: `steps` below 1, labels outside of the model's, guidance without label dropout,
            a model that predicts variances too.
    """
    classes = model.num_classes
    if labels.dim() != 1:
        raise ValueError(f"labels must be [B], got shape {list(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(
            f"labels must lie in [0, {classes}], got values from {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    if guidance != 1 and model.y_embedder.dropout_prob == 0:
        raise ValueError(f"guidance must be 1 for a model without label dropout, got {guidance}")
    if model.learn_sigma:
        raise ValueError("model must predict velocities alone: build it with learn_sigma=False")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    side = model.input_size
    return sample(
        model,
        scheduler,
        (len(labels), model.in_channels, side, side),
        seed=seed,
        sample_ids=sample_ids,
        conditions={"y": labels},
        unconditional={"y": torch.full_like(labels, classes)},
        guidance_scale=guidance,
        progress=progress,
    )


@dataclass
class Pipeline:
    """Class labels to images.

    Attributes:
        vqvae, dit: trained models, in eval mode.
        dit_arguments: what `DiT(...)` was built with.
        scale: of the latents that the DiT works in.
        class_names: one a label.
    """

    vqvae: VQVAE
    dit: DiT
    dit_arguments: dict[str, Any]
    scale: LatentScale
    class_names: list[str]

    def sample(
        self,
        labels: Tensor,
        *,
        seed: int = 0,
        steps: int = 25,
        guidance: float = 2.0,
        progress: bool = False,
    ) -> Tensor:
        """Images `[B, C, S, S]` in [-1, 1] for labels `[B]`.

        Image i depends on (seed, i, labels[i]), not on the rest of the batch. The transformer's
        latents are snapped to their nearest codes before they are decoded.
        """
        latents = sample_flow(
            self.dit, labels, seed=seed, steps=steps, guidance=guidance, progress=progress
        )
        with torch.no_grad():
            return decode(self.vqvae, self.vqvae.snap(self.scale.restore(latents)))

    def save(self, folder: str | Path) -> None:
        """Write `vqvae.safetensors` and `dit.safetensors`, each with its configuration."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _save(folder / VQVAE_FILE, self.vqvae, asdict(self.vqvae.config))
        about_dit = {
            "arguments": self.dit_arguments,
            "latent_scale": asdict(self.scale),
            "class_names": self.class_names,
        }
        _save(folder / DIT_FILE, self.dit, about_dit)

    @staticmethod
    def load(folder: str | Path) -> Pipeline:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file was written by something else.
        """
        vqvae_weights, config = _load(Path(folder) / VQVAE_FILE, ("in_channels", "codebook_size"))
        vqvae = VQVAE(VQVAEConfig(**config))
        vqvae.load_state_dict(vqvae_weights)
        dit_weights, about = _load(
            Path(folder) / DIT_FILE, ("arguments", "latent_scale", "class_names")
        )
        dit = DiT(**about["arguments"])
        dit.load_state_dict(dit_weights)
        return Pipeline(
            vqvae.eval(),
            dit.eval(),
            about["arguments"],
            LatentScale(**about["latent_scale"]),
            about["class_names"],
        )


def _per_channel(values: list[float], latents: Tensor) -> Tensor:
    return latents.new_tensor(values)[:, None, None]


def _save(path: Path, model: nn.Module, about: dict[str, Any]) -> None:
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "vqkernels": json.dumps(about)}
    require("safetensors.torch").save_file(weights, path, metadata=metadata)


def _load(path: Path, expected: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("vqkernels", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"checkpoint {path} is not a safetensors file: {error}") from error
    missing = [name for name in expected if name not in about]
    if missing:
        raise ValueError(f"checkpoint {path} was not written by vqkernels: no {missing[0]} in it")
    return weights, about
