"""What a Diffusion Transformer conditions on: timestep and class label, and its patch embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqkernels.ops.timestep_embedding import timestep_embedding


class TimestepEmbedder(nn.Module):
    """Timesteps `[B]` to vectors `[B, hidden_size]`: sinusoids, then a two-layer MLP.

    Source: arXiv:2212.09748, section 3.2. Parameter names are facebookresearch/DiT's.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        frequencies = timestep_embedding(t, self.frequency_embedding_size)
        return self.mlp(frequencies.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class labels `[B]` to vectors `[B, hidden_size]`, dropped at random for guidance.

    A dropped label becomes the extra class `num_classes`, which stands for "no class"; the table
    holds that row when `dropout_prob > 0`. Source: Ho & Salimans, "Classifier-Free Diffusion
    Guidance", arXiv:2207.12598.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Labels with some replaced by `num_classes`: those where `force_drop_ids` is 1, or at
        random with probability `dropout_prob`."""
        if force_drop_ids is None:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
        else:
            drop = force_drop_ids == 1
        return torch.where(drop, self.num_classes, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)


class PatchEmbed(nn.Module):
    """Images `[B, C, H, W]` to patch tokens `[B, H/p * W/p, hidden_size]`, row by row."""

    def __init__(
        self, input_size: int, patch_size: int, in_channels: int, hidden_size: int
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(
                f"input_size must be a multiple of patch_size {patch_size}, got {input_size}"
            )
        self.input_size = input_size
        self.num_patches = (input_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.proj.in_channels
        if x.dim() != 4 or x.shape[1:] != (channels, self.input_size, self.input_size):
            raise ValueError(
                f"x must be [B, {channels}, {self.input_size}, {self.input_size}], "
                f"got shape {list(x.shape)}"
            )
        return self.proj(x).flatten(2).mT


def sincos_position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed positions of a square grid, row by row: `[grid_size^2, hidden_size]` in fp32.

    The first half of each vector encodes the column and the second the row, each as
    [sin, cos] at geometric frequencies (the layout of facebookresearch/DiT's `pos_embed`).
    """
    if hidden_size % 4:
        raise ValueError(f"hidden_size must be a multiple of 4, got {hidden_size}")
    quarter = hidden_size // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()
