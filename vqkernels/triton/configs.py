"""Launch configurations as data: what each search runs with, and why.

A row is an estimate unless it says what was measured: it follows from compiled code (registers,
shared memory, instructions; see tests/compile) and from the floors at the head of the kernel files.
`select_tiles` and `select_lanes` return the first row that fits; a launcher takes any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqkernels.selection import FAMILIES, family


@dataclass(frozen=True)
class TileConfig:
    """One row for `search_tiles`.

    Attributes:
        families: the GPU families it is for, as `family` names them.
        products: "native" for products of the inputs as they are (half precision on tensor cores;
            fp32 in IEEE lanes), "split" for fp32 as bf16 terms.
        dim: the largest D that stays on chip with it; 0 for a D that is streamed in chunks.
        rows: the most rows a book that it is for, 0 for any number.
        block_n, block_k, block_d: rows and codes a tile, and the chunk of D.
        lanes: running minima a row; the columns that one thread holds repeat after so many.
        num_warps, num_stages: Triton's.
        programs: how many should share a multiprocessor; fewer, and K is split.
        reason: why these numbers.
    """

    families: tuple[str, ...]
    products: str
    dim: int
    rows: int
    block_n: int
    block_k: int
    block_d: int
    lanes: int
    num_warps: int
    num_stages: int
    programs: int
    reason: str


@dataclass(frozen=True)
class LaneConfig:
    """One row for `search_lanes`: rows and codes a tile, Triton's warps, programs sharing a
    multiprocessor before K is split no further."""

    dim: int
    block_n: int
    block_k: int
    num_warps: int
    programs: int
    reason: str


# Shared memory a block: 163 KiB (ampere), 99 (small), 227 (hopper, blackwell).
_ANY = FAMILIES
_MMA_SYNC = ("ampere", "small")
_LARGE = ("ampere", "hopper", "blackwell")
_WARPGROUP = ("hopper", "blackwell")

# fmt: off
TILE_CONFIGS = (
    # Few rows: reading the book is the floor. The smallest row tile, many splits of K.
    TileConfig(("small",), "native", 256, 32, 16, 64, 256, 32, 4, 2, 2,
               "16 rows fill one mma.sync, four warps side by side on the codes: 32 lanes; 64 KiB "
               "of codes on their way"),
    TileConfig(_LARGE, "native", 256, 32, 16, 128, 256, 32, 4, 3, 1,
               "as above, 128 KiB of codes on their way"),
    TileConfig(_ANY, "native", 0, 32, 16, 128, 128, 32, 4, 3, 2,
               "as above, D in chunks of 128"),
    TileConfig(_ANY, "split", 0, 32, 16, 128, 128, 32, 4, 3, 2,
               "as above, one product of terms at a time"),

    TileConfig(_WARPGROUP, "native", 64, 0, 128, 128, 64, 8, 4, 3, 2,
               "64 KiB and under 255 registers: programs share a multiprocessor, the minimum of "
               "one hides behind the products of the other; measured on an H100, K = 16384: "
               "0.38 ms, the best of 14 shapes"),
    TileConfig(_WARPGROUP, "native", 128, 0, 128, 128, 128, 8, 4, 2, 2,
               "96 KiB: two programs share a multiprocessor"),
    TileConfig(("hopper",), "native", 256, 0, 128, 64, 256, 8, 4, 4, 1,
               "measured on an H100, K = 16384: 1.23 ms; 128 codes a tile and two stages 1.36 with "
               "four warps, 1.39 with eight; D in chunks 1.53"),
    TileConfig(("blackwell",), "native", 256, 0, 128, 128, 256, 8, 4, 2, 1,
               "as on hopper; four warps, because eight share a row of a tcgen05 result and would "
               "exchange minima through shared memory for every tile"),
    TileConfig(("hopper",), "native", 0, 0, 128, 256, 64, 8, 8, 3, 1,
               "x is read again for each tile of codes, so that reading from L2 is the floor: the "
               "widest tile whose sums stay in registers; 48 KiB a stage"),
    TileConfig(("blackwell",), "native", 0, 0, 128, 128, 64, 8, 8, 3, 2,
               "32 KiB a stage; eight warps, since minima are exchanged once in D / 64 steps only"),
    TileConfig(_MMA_SYNC, "native", 64, 0, 128, 128, 64, 32, 8, 2, 2,
               "48 KiB; warps in four columns: 32 lanes; 8 warps keep the sums out of memory"),
    TileConfig(_MMA_SYNC, "native", 128, 0, 128, 64, 128, 16, 8, 2, 2,
               "48 KiB; warps in two columns: 16 lanes"),
    TileConfig(("ampere",), "native", 256, 0, 128, 64, 256, 16, 8, 2, 1,
               "96 KiB of 163"),
    TileConfig(_MMA_SYNC, "native", 0, 0, 128, 128, 64, 32, 8, 3, 1,
               "64 KiB; D in chunks, because 64 KiB of x would leave no room for two tiles"),

    TileConfig(("hopper",), "split", 64, 0, 128, 64, 64, 8, 8, 2, 2,
               "48 KiB of x and 24 KiB of codes a stage: two programs share a multiprocessor"),
    TileConfig(("hopper",), "split", 128, 0, 128, 64, 128, 8, 8, 2, 1,
               "192 KiB, one program; in chunks, x would be read again for each tile of codes"),
    TileConfig(("hopper",), "split", 0, 0, 128, 256, 64, 8, 8, 3, 1,
               "reading from L2 is the floor, hence the wide tile; 48 KiB a stage"),
    TileConfig(("blackwell",), "split", 64, 0, 128, 64, 64, 8, 4, 2, 2,
               "as on hopper, four warps"),
    TileConfig(("blackwell",), "split", 0, 0, 128, 128, 64, 8, 8, 3, 2,
               "as for native products"),
    TileConfig(("ampere",), "split", 64, 0, 128, 64, 64, 16, 8, 2, 1,
               "as on hopper, within 163 KiB"),
    TileConfig(_MMA_SYNC, "split", 0, 0, 128, 128, 64, 32, 8, 3, 1,
               "32 KiB a stage, within 99 KiB"),
)

LANE_CONFIGS = (
    LaneConfig(8, 512, 16, 4, 3,
               "four rows a thread: one broadcast load of four codes serves 16 multiply-adds; 64 "
               "sums and 32 entries of x in registers; 32 codes a tile spill on sm_120"),
    LaneConfig(16, 256, 16, 4, 3,
               "two rows a thread, since 16 entries of each row stay in registers"),
)
# fmt: on


def select_tiles(capability: int, products: str, dim: int, rows: int) -> TileConfig:
    """The first row for this GPU, kind of products, D and number of rows a book."""
    streamed = -(-dim // 64) * 64 < block_of(dim)
    for config in TILE_CONFIGS:
        fits_dim = config.dim == 0 or (dim <= config.dim and not streamed)
        fits_rows = config.rows == 0 or rows <= config.rows
        if (
            family(capability) in config.families
            and config.products == products
            and fits_dim
            and fits_rows
        ):
            return config
    raise AssertionError("TILE_CONFIGS ends with a row for every family and kind")


def select_lanes(dim: int) -> LaneConfig:
    return next(config for config in LANE_CONFIGS if dim <= config.dim)


def block_of(dim: int) -> int:
    """The power of two that holds D; 16 is the smallest step of a tensor core."""
    return max(16, 1 << (dim - 1).bit_length())
