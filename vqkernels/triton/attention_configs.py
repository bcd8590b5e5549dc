"""Launch configurations of attention as data: what each kernel runs with, and why.

A row is an estimate unless it says what was measured: it follows from compiled code (registers,
shared memory; tests/compile) and from the floors at the head of the kernel files. Measured were, on
an H100, B = 4, H = 16, N = M = 4096, bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vqkernels.selection import FAMILIES, family


@dataclass(frozen=True)
class AttentionConfig:
    """One row.

    Attributes:
        kernel: "forward", "queries" (gradient of q) or "keys" (gradients of k and v).
        families: the GPU families it is for, as `family` names them.
        products: "half", or "split" for fp32 as six products of bf16 terms.
        dim: the most columns of a padded head.
        block_q, block_k: queries and keys of a tile.
        num_warps, num_stages: Triton's.
        registers: the most a thread, 0 for as many as it takes.
        reason: why these numbers.
        spare: whether its shared memory has room for one more tile of queries and keys, as a mask
            or dropout needs.
    """

    kernel: str
    families: tuple[str, ...]
    products: str
    dim: int
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int
    reason: str
    spare: bool = True


class Parts(NamedTuple):
    """Widths of the one or two powers of two that a row of columns is read in."""

    first: int
    second: int

    @property
    def padded(self) -> int:
        return self.first + self.second


def parts_of(columns: int) -> Parts:
    """The powers of two, 16 or more, that hold the columns with the least padding: 72 is read as
    64 + 16 instead of 128."""
    whole = max(16, 1 << (columns - 1).bit_length())
    first = whole // 2
    second = max(16, 1 << (columns - first - 1).bit_length()) if columns > first else 0
    return Parts(first, second) if first >= 16 and first + second < whole else Parts(whole, 0)


_MMA_SYNC = ("ampere", "small")
_WARPGROUP = ("hopper", "blackwell")

# fmt: off
CONFIGS = (
    AttentionConfig("forward", _WARPGROUP, "half", 80, 128, 64, 8, 3, 128,
                    "measured: 0.66 ms at 64 columns, 0.86 at 72 (1.05 for the next); two "
                    "warpgroups of 64 queries; within 128 registers and 80 KiB two programs "
                    "share a multiprocessor, one's exponentials beside the other's products; with "
                    "64 queries the keys would leave L2 twice as often, at 13 TB/s"),
    AttentionConfig("forward", ("hopper",), "half", 128, 128, 128, 8, 3, 0,
                    "measured: 1.22 ms; 64 keys 1.45; 224 of 227 KiB, to which a tile of a mask "
                    "would add 32 and what dropout keeps 16", spare=False),
    AttentionConfig("forward", _WARPGROUP, "half", 128, 128, 64, 8, 3, 0,
                    "200 registers: one program, 96 KiB of k and v on their way"),
    AttentionConfig("forward", _WARPGROUP, "half", 256, 128, 64, 8, 2, 0,
                    "128 KiB of k and v, 64 KiB of q"),
    AttentionConfig("forward", _MMA_SYNC, "half", 128, 128, 64, 8, 2, 0,
                    "16 queries a warp; with 32 scores and sums spill; 64 KiB of k and v"),
    AttentionConfig("forward", _MMA_SYNC, "half", 256, 64, 32, 8, 2, 0,
                    "64 KiB of k and v, 32 KiB of q within 99"),
    AttentionConfig("forward", ("small",), "split", 80, 64, 16, 4, 2, 0,
                    "as below; 32 keys spill"),
    AttentionConfig("forward", FAMILIES, "split", 80, 64, 32, 4, 2, 0,
                    "each operand stands in three terms; small tiles keep them in registers"),
    AttentionConfig("forward", FAMILIES, "split", 128, 64, 16, 8, 2, 0,
                    "as above, 74 KiB at 128 columns"),
    AttentionConfig("forward", ("small",), "split", 256, 32, 16, 8, 2, 0,
                    "85 of 99 KiB; three terms of 256 columns spill with any tile"),
    AttentionConfig("forward", FAMILIES, "split", 256, 64, 16, 8, 2, 0,
                    "138 of 163 KiB"),

    AttentionConfig("queries", ("hopper",), "half", 80, 64, 64, 4, 3, 0,
                    "measured: the best of 11 shapes at 64 columns, within 2% of it at 72"),
    AttentionConfig("queries", ("hopper",), "half", 128, 128, 128, 8, 2, 0,
                    "measured: 0.4 ms less than 64 queries and 32 keys"),
    AttentionConfig("queries", _WARPGROUP, "half", 80, 64, 64, 4, 2, 0,
                    "a warpgroup of 64 queries; 60 KiB, two or three programs"),
    AttentionConfig("queries", FAMILIES, "half", 128, 64, 32, 4, 2, 0,
                    "half the keys for 128 columns of sums, and for warps of mma.sync"),
    AttentionConfig("queries", _MMA_SYNC, "half", 256, 32, 16, 4, 2, 0,
                    "within 99 KiB"),
    AttentionConfig("queries", _WARPGROUP, "half", 256, 64, 32, 8, 2, 0,
                    "two warpgroups share 256 columns of sums"),
    AttentionConfig("queries", FAMILIES, "split", 80, 64, 16, 4, 2, 0,
                    "three terms of each operand; small tiles keep them in registers"),
    AttentionConfig("queries", FAMILIES, "split", 128, 32, 16, 8, 1, 0,
                    "as above, 56 KiB at 128 columns"),
    AttentionConfig("queries", ("small",), "split", 256, 16, 16, 8, 1, 0,
                    "64 of 99 KiB, and the fewest spills"),
    AttentionConfig("queries", FAMILIES, "split", 256, 32, 16, 8, 1, 0,
                    "112 of 163 KiB"),

    AttentionConfig("keys", ("hopper",), "half", 80, 64, 64, 4, 3, 0,
                    "measured: the best of 13 shapes at 72 columns, within 1% of it at 64"),
    AttentionConfig("keys", ("hopper",), "half", 128, 64, 128, 8, 3, 0,
                    "measured: the best of 13 shapes"),
    AttentionConfig("keys", _WARPGROUP, "half", 80, 64, 64, 4, 2, 0,
                    "a warpgroup of 64 keys; two sums of 80 columns; 60 KiB, two programs"),
    AttentionConfig("keys", _MMA_SYNC, "half", 80, 32, 64, 4, 2, 0,
                    "as above; 64 queries spill"),
    AttentionConfig("keys", FAMILIES, "half", 128, 32, 64, 8, 2, 0,
                    "eight warps for two sums of 128 columns"),
    AttentionConfig("keys", _MMA_SYNC, "half", 256, 16, 32, 8, 2, 0,
                    "within 99 KiB"),
    AttentionConfig("keys", ("hopper",), "half", 256, 16, 64, 8, 2, 0,
                    "two sums of 256 columns take 128 registers of each of eight warps; 32 "
                    "queries spill"),
    AttentionConfig("keys", ("blackwell",), "half", 256, 32, 64, 8, 2, 0,
                    "the sums stand in tensor memory"),
    AttentionConfig("keys", FAMILIES, "split", 80, 16, 64, 4, 2, 0,
                    "three terms of each operand; small tiles keep them in registers"),
    AttentionConfig("keys", FAMILIES, "split", 128, 16, 32, 8, 1, 0,
                    "as above, 64 KiB at 128 columns"),
    AttentionConfig("keys", ("small",), "split", 256, 16, 16, 8, 1, 0,
                    "80 of 99 KiB, and the fewest spills"),
    AttentionConfig("keys", FAMILIES, "split", 256, 16, 32, 8, 1, 0,
                    "128 of 163 KiB"),
)
# fmt: on


def select_attention(
    kernel: str, capability: int, products: str, dim: int, crowded: bool = False
) -> AttentionConfig:
    """The first row for this kernel, GPU, kind of products and padded columns. `crowded`: with a
    mask of queries and keys, or with dropout."""
    for config in CONFIGS:
        if (
            config.kernel == kernel
            and family(capability) in config.families
            and config.products == products
            and dim <= config.dim
            and (config.spare or not crowded)
        ):
            return config
    raise ValueError(f"q, k and v must have at most 256 columns, got {dim}")
