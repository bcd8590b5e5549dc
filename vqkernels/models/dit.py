"""DiT: a Diffusion Transformer over latent grids, conditioned on timestep and class.

Source: Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", arXiv:2212.09748.
Argument and parameter names, and so checkpoints, are facebookresearch/DiT's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.nn.dit_block import DiTBlock, FinalLayer
from vqkernels.nn.embedders import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_position_embedding,
)


class DiT(nn.Module):
    """Predicts noise or velocity for a noised latent `[B, C, H, W]` at timestep t and class y.

    Args:
        input_size: height and width of the latent grid.
        patch_size: side of the square patch behind each token.
        in_channels: C.
        hidden_size, depth, num_heads, mlp_ratio: of the transformer.
        class_dropout_prob: how often a label is dropped in training; above zero the model can
            sample with classifier-free guidance, and `num_classes` is the label "no class".
        num_classes: number of classes.
        learn_sigma: also predict a variance, as the original does: 2 C output channels.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        self.learn_sigma = learn_sigma
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.num_classes = num_classes

        self.input_size = input_size
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = sincos_position_embedding(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier everywhere, small embeddings, and zero for all modulation and the output."""
        for name, parameter in self.named_parameters():
            if name == "pos_embed":
                continue
            if name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)
            elif "t_embedder" in name or "y_embedder" in name:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """`[B, N, p * p * C]` to `[B, C, H, W]`."""
        batch, count, _ = tokens.shape
        side, p = int(count**0.5), self.patch_size
        grid = tokens.reshape(batch, side, side, p, p, self.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, side * p, side * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """One prediction.

        Args:
            x: `[B, C, H, W]`.
            t: timesteps `[B]`, in [0, 1000) by convention; may be fractional.
            y: int64 labels `[B]` in [0, num_classes], where num_classes is "no class".

        Returns:
            `[B, C or 2 C, H, W]`.
        """
        tokens = self.x_embedder(x) + self.pos_embed  # [B, N, D]
        c = self.t_embedder(t) + self.y_embedder(y, self.training)  # [B, D]
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guided_channels: int | None = None
    ) -> Tensor:
        """A prediction pushed away from the unconditional one: `u + cfg_scale * (c - u)`.

        Args:
            x: `[2 B, C, H, W]`; only the first half is read, it serves both predictions.
            t: `[2 B]`.
            y: `[2 B]`: first the labels, then "no class" for the second half.
            cfg_scale: 1 is the conditional prediction, 0 the unconditional one.
            guided_channels: how many leading channels to guide, all C by default. The original
                code guides 3 of its 4.

        Returns:
            `[2 B, C or 2 C, H, W]`, the guided prediction twice; the remaining channels are
            each half's own.
        """
        if len(x) % 2:
            raise ValueError(f"x must have an even batch [2 B, C, H, W], got {list(x.shape)}")
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        channels = self.in_channels if guided_channels is None else guided_channels
        guided, rest = out[:, :channels], out[:, channels:]
        cond, uncond = guided.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


_SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}

DiT_models: dict[str, Callable[..., DiT]] = {
    f"DiT-{size}/{patch_size}": partial(DiT, patch_size=patch_size, **dict[str, Any](shape))
    for size, shape in _SIZES.items()
    for patch_size in (2, 4, 8)
}
