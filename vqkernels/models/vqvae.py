"""VQ-VAE: a convolutional autoencoder whose latent grid is made of codes.

Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", arXiv:1711.00937.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.nn.vector_quantize import VectorQuantize


@dataclass(frozen=True)
class VQVAEConfig:
    """Shape of a VQVAE.

    Attributes:
        in_channels: channels of the images.
        hidden_channels: width at the latent resolution; half of it one level above.
        num_downsamples: halvings of height and width.
        num_residual_blocks: residual blocks of the decoder. The encoder has none: codes that
            describe their own patch are easier to generate than codes that lean on each other.
        codebook_size: number of codes.
        codebook_dim: channels of the latent grid, the dimension of a code.
        commitment_weight: of the commitment loss beside the reconstruction loss. Well above the
            usual 0.25: it makes a latent grid smoother, which a small transformer learns sooner.
        decay: of the codebook's moving averages.
        threshold_ema_dead_code: average uses a step below which a code is moved.
    """

    in_channels: int = 1
    hidden_channels: int = 64
    num_downsamples: int = 2
    num_residual_blocks: int = 2
    codebook_size: int = 512
    codebook_dim: int = 4
    commitment_weight: float = 5.0
    decay: float = 0.95
    threshold_ema_dead_code: float = 0.2

    @property
    def downsampling(self) -> int:
        """Side of the square of pixels behind one code."""
        return 2**self.num_downsamples


class VQVAEOutput(NamedTuple):
    """What a VQVAE returns.

    Attributes:
        reconstruction: `[B, C, H, W]`.
        indices: int64 codes `[B, H / f, W / f]`, f = downsampling.
        loss: scalar to minimize, reconstruction_loss plus the weighted commitment loss.
        reconstruction_loss: scalar mean squared error.
    """

    reconstruction: Tensor
    indices: Tensor
    loss: Tensor
    reconstruction_loss: Tensor


class ResidualBlock(nn.Module):
    """x + conv1x1(silu(conv3x3(silu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class VQVAE(nn.Module):
    """Images `[B, C, H, W]` in [-1, 1] to grids of codes and back.

    Args:
        config: the shape.
        quantizer: used instead of `vqkernels.nn.VectorQuantize`; any module with its interface.
    """

    def __init__(self, config: VQVAEConfig, quantizer: VectorQuantize | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.quantizer = quantizer or VectorQuantize(
            config.codebook_dim,
            config.codebook_size,
            decay=config.decay,
            commitment_weight=config.commitment_weight,
            kmeans_init=True,
            threshold_ema_dead_code=config.threshold_ema_dead_code,
            rotation_trick=False,
            accept_image_fmap=True,
        )
        self.decoder = _decoder(config)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images to (quantized latents `[B, codebook_dim, h, w]`, indices `[B, h, w]`, weighted
        commitment loss)."""
        factor, channels = self.config.downsampling, self.config.in_channels
        fits = images.dim() == 4 and images.shape[1] == channels
        if not fits or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images must be [B, {channels}, H, W] with H and W multiples of {factor}, "
                f"got shape {list(images.shape)}"
            )
        return self.quantizer(self.encoder(images))

    def decode(self, quantized: Tensor) -> Tensor:
        """Quantized latents `[B, codebook_dim, h, w]` to images `[B, C, H, W]`."""
        return self.decoder(quantized)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Codes `[B, h, w]` to images `[B, C, H, W]`."""
        return self.decode(self.quantizer.get_output_from_indices(indices))

    def snap(self, latents: Tensor) -> Tensor:
        """Latents `[B, codebook_dim, h, w]` to their nearest codes; learns nothing."""
        return self.quantizer(latents, freeze_codebook=True)[0]

    def forward(self, images: Tensor) -> VQVAEOutput:
        quantized, indices, commitment = self.encode(images)
        reconstruction = self.decode(quantized)
        reconstruction_loss = F.mse_loss(reconstruction, images)
        loss = reconstruction_loss + commitment
        return VQVAEOutput(reconstruction, indices, loss, reconstruction_loss)


def _widths(config: VQVAEConfig) -> list[int]:
    """Channels after each halving, full width at the last."""
    halves = [config.hidden_channels // 2] * (config.num_downsamples - 1)
    return [*halves, config.hidden_channels]


def _encoder(config: VQVAEConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = config.in_channels
    for width in _widths(config):
        layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, config.codebook_dim, 1))


def _decoder(config: VQVAEConfig) -> nn.Sequential:
    widths = _widths(config)[::-1]
    layers: list[nn.Module] = [nn.Conv2d(config.codebook_dim, widths[0], 3, padding=1)]
    layers += [ResidualBlock(widths[0]) for _ in range(config.num_residual_blocks)]
    for width, next_width in zip(widths, [*widths[1:], config.in_channels], strict=True):
        layers += [nn.SiLU(), nn.ConvTranspose2d(width, next_width, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)
