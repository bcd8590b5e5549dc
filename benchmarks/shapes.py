"""Benchmark shapes taken from real models.

N is the number of vectors of one training step on one device. A row may carry `tokens_cap`, the N
used on machines with two cores; a capped row says so in its label and never hides the original N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Metric = Literal["l2", "dot", "cosine"]


@dataclass(frozen=True)
class CodebookShape:
    """One nearest-code problem: `tokens` vectors of `dim` against `codebook_size` codes."""

    name: str
    tokens: int
    dim: int
    codebook_size: int
    metric: Metric
    source: str
    books: int = 1
    books_note: str = ""
    tokens_cap: int | None = None

    @property
    def timed_tokens(self) -> int:
        return self.tokens if self.tokens_cap is None else min(self.tokens, self.tokens_cap)

    @property
    def label(self) -> str:
        capped = f" (of {self.tokens})" if self.timed_tokens < self.tokens else ""
        return f"N{self.timed_tokens}{capped} D{self.dim} K{self.codebook_size} {self.metric}"


@dataclass(frozen=True)
class ScalarQuantizerShape:
    """A quantizer without a learned book: `levels` per dimension, or `bits` of sign code."""

    name: str
    tokens: int
    source: str
    levels: tuple[int, ...] = ()
    bits: int = 0

    @property
    def codebook_size(self) -> int:
        size = 1
        for level in self.levels or (2,) * self.bits:
            size *= level
        return size


@dataclass(frozen=True)
class TransformerShape:
    """A Diffusion Transformer: `depth` blocks of width `hidden_size` (FLUX adds single blocks)."""

    name: str
    depth: int
    hidden_size: int
    num_heads: int
    head_dim: int
    tokens: tuple[int, ...]
    text_tokens: int = 0
    single_depth: int = 0


@dataclass(frozen=True)
class NoiseShape:
    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


# Caps keep one float32 [N, K] matrix of the peers, which do form it, near or under 1 GiB.
CODEBOOK_SHAPES: tuple[CodebookShape, ...] = (
    CodebookShape("taming-f16", 3072, 256, 1024, "l2", "VQGAN"),
    CodebookShape("taming-f16", 3072, 256, 16384, "l2", "VQGAN"),
    CodebookShape("ldm-f4", 32768, 3, 8192, "l2", "latent diffusion VQ", tokens_cap=8192),
    CodebookShape("emu3", 32768, 4, 32768, "l2", "Emu3 tokenizer", tokens_cap=8192),
    CodebookShape("llamagen", 4096, 8, 16384, "cosine", "LlamaGen f16"),
    CodebookShape("vit-vqgan", 32768, 32, 8192, "cosine", "ViT-VQGAN", tokens_cap=8192),
    CodebookShape(
        "var", 21760, 32, 4096, "l2", "VAR", 1, "10 scales share one book", tokens_cap=10880
    ),
    CodebookShape("simvq", 16384, 128, 1024, "l2", "SimVQ"),
    CodebookShape("simvq", 16384, 128, 16384, "l2", "SimVQ", tokens_cap=4096),
    CodebookShape("simvq", 16384, 128, 262144, "l2", "SimVQ", tokens_cap=1024),
    CodebookShape("ibq", 1024, 256, 262144, "dot", "IBQ"),
    CodebookShape("wavtokenizer", 9000, 512, 4096, "l2", "WavTokenizer, speech"),
    CodebookShape("encodec-24k", 4800, 128, 1024, "l2", "EnCodec", 32, "residual"),
    CodebookShape("musicgen", 3200, 128, 2048, "l2", "MusicGen codec", 4, "residual"),
    CodebookShape(
        "dac-44k", 2376, 8, 1024, "cosine", "Descript audio codec", 9, "residual, projected"
    ),
    CodebookShape("mimi", 8000, 256, 2048, "l2", "Mimi", 32, "1 + 31 residual"),
    CodebookShape("snac", 4096, 8, 4096, "cosine", "SNAC", 3, "residual"),
    CodebookShape(
        "best-rq", 32768, 16, 8192, "cosine", "speech encoder", 16, "heads", tokens_cap=8192
    ),
    CodebookShape("kv-cache", 524288, 32, 2048, "l2", "vqllm", 8, "residual", tokens_cap=32768),
    CodebookShape("streaming", 1, 256, 16384, "l2", "batch-1 inference"),
    CodebookShape("streaming", 16, 256, 16384, "l2", "batch-1 inference"),
    CodebookShape("streaming", 256, 256, 16384, "l2", "batch-1 inference"),
    CodebookShape("vq-vae", 16384, 64, 512, "l2", "VQ-VAE, van den Oord et al. 2017"),
)

SCALAR_QUANTIZER_SHAPES: tuple[ScalarQuantizerShape, ...] = (
    ScalarQuantizerShape("fsq-cosmos", 32768, "Cosmos", levels=(8, 8, 8, 5, 5, 5)),
    ScalarQuantizerShape("lfq", 2048, "Open-MAGVIT2, entropy loss", bits=18),
)

TRANSFORMER_SHAPES: tuple[TransformerShape, ...] = (
    TransformerShape("DiT-S/8", 12, 384, 6, 64, (16, 64)),
    TransformerShape("DiT-S/4", 12, 384, 6, 64, (64, 256)),
    TransformerShape("DiT-S/2", 12, 384, 6, 64, (256, 1024)),
    TransformerShape("DiT-B/2", 12, 768, 12, 64, (256, 1024)),
    TransformerShape("DiT-L/2", 24, 1024, 16, 64, (256, 1024)),
    TransformerShape("DiT-XL/2", 28, 1152, 16, 72, (256, 1024)),
    TransformerShape("PixArt-Sigma", 28, 1152, 16, 72, (1024, 4096), text_tokens=300),
    TransformerShape("SD3-M", 24, 1536, 24, 64, (4096,), text_tokens=154),
    TransformerShape("FLUX.1", 19, 3072, 24, 128, (4096,), text_tokens=512, single_depth=38),
)

TRAINING_BATCH = 256
TRAINING_LEARNING_RATE = 1e-4
TRAINING_WEIGHT_EMA = 0.9999
SAMPLING_LABELS = 8
SAMPLING_STEPS = 250

NOISE_SHAPES: tuple[NoiseShape, ...] = (
    NoiseShape("latent-256", (32, 4, 32, 32), ("float32", "bfloat16")),
    NoiseShape("latent-512", (32, 4, 64, 64), ("float32", "bfloat16")),
    NoiseShape("pixels-256", (16, 3, 256, 256), ("float32", "bfloat16")),
    NoiseShape("video", (1, 16, 21, 60, 104), ("bfloat16",)),
    NoiseShape("audio-latent", (64, 64, 256), ("float32",)),
)


def codebook_shape(name: str, codebook_size: int | None = None) -> CodebookShape:
    """The row called `name`; `codebook_size` picks one where a model has several.

    Raises:
        KeyError: no row, or more than one, matches.
    """
    matching = [
        row
        for row in CODEBOOK_SHAPES
        if row.name == name and codebook_size in (None, row.codebook_size)
    ]
    if len(matching) != 1:
        found = [row.label for row in matching]
        raise KeyError(f"{name!r} with codebook_size={codebook_size} matches {found}, expected one")
    return matching[0]
