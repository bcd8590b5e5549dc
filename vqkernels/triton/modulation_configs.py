"""Launch configurations of the modulation kernels as data: what each runs with, and why.

A row is an estimate unless it says what was measured: it follows from compiled code (registers;
tests/compile) and from the floors at the head of the kernel files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowConfig:
    """One row.

    Attributes:
        kernel: "norm", "norm backward", "gate", "gate backward", "gelu" or "gelu backward".
        dim: the largest D that it is for, 0 for any.
        rows: tokens of a tile.
        block: the most columns of a tile where rows are read in blocks; 0 for whole rows.
        num_warps: Triton's.
        stages: Triton's, of the loop over a chunk's tiles; 1 loads what it needs when it needs it.
        chunk: the most rows that one program sums, 0 where nothing is summed.
        programs: a chunk is halved while there would be fewer.
        reason: why these numbers.
    """

    kernel: str
    dim: int
    rows: int
    block: int
    num_warps: int
    stages: int
    chunk: int
    programs: int
    reason: str


# fmt: off
CONFIGS = (
    RowConfig("norm", 512, 4, 0, 4, 1, 0, 0,
              "16 elements a thread and tensor; four rows share a load of the vectors"),
    RowConfig("norm", 1536, 1, 0, 2, 1, 0, 0,
              "measured on an H100 at 1152: 96% of the copy rate; one row by four warps 86%, two "
              "rows by two warps 83%, by four 76%"),
    RowConfig("norm", 4096, 1, 0, 4, 1, 0, 0, "one row, at most 32 elements a thread and tensor"),
    RowConfig("norm", 8192, 1, 0, 8, 1, 0, 0, "as above"),
    RowConfig("norm", 0, 1, 4096, 8, 1, 0, 0,
              "rows beyond what registers hold: statistics first, then blocks of columns"),

    RowConfig("norm backward", 512, 4, 0, 4, 1, 64, 512,
              "16 elements a thread of each of x, the gradient and two sums; 512 programs of four "
              "warps fill 132 multiprocessors once, and 64 rows keep the sums' traffic under 5%"),
    RowConfig("norm backward", 1536, 1, 0, 2, 1, 64, 1024,
              "one row by two warps, as measured for the forward pass: many small programs hide "
              "each other's reductions; up to six share a multiprocessor, so twice as many"),
    RowConfig("norm backward", 3072, 1, 0, 8, 1, 64, 512, "as above, 16 elements a thread at most"),
    RowConfig("norm backward", 4096, 1, 0, 16, 1, 64, 512, "as above; 8 warps would spill"),
    RowConfig("norm backward", 0, 2, 1024, 8, 1, 64, 512,
              "sums along rows first, then blocks of columns: 8192 columns would spill"),

    RowConfig("gate", 1024, 4, 0, 4, 1, 0, 0, "up to 32 elements a thread and tensor"),
    RowConfig("gate", 2048, 2, 0, 4, 1, 0, 0, "as above"),
    RowConfig("gate", 0, 2, 1024, 4, 1, 0, 0, "blocks of columns, 16 elements a thread and tensor"),
    RowConfig("gate backward", 1024, 4, 0, 4, 1, 64, 512, "as the norm's"),
    RowConfig("gate backward", 2048, 2, 0, 4, 1, 64, 512, "as the norm's"),
    RowConfig("gate backward", 0, 4, 512, 4, 1, 64, 512, "as the norm's, in blocks of columns"),

    RowConfig("gelu", 0, 4, 1024, 4, 1, 0, 0,
              "32 elements a thread; four rows share a load of the bias"),
    RowConfig("gelu backward", 0, 4, 512, 4, 1, 128, 1024,
              "16 elements a thread of x, the gradient and the sum"),
)
# fmt: on


def select_rows(kernel: str, dim: int) -> RowConfig:
    """The first row for this kernel and D."""
    for config in CONFIGS:
        if config.kernel == kernel and (config.dim == 0 or dim <= config.dim):
            return config
    raise AssertionError("CONFIGS ends with a row for any D of every kernel")


def chunk_rows(config: RowConfig, span: int, spans: int, tile_rows: int, blocks: int = 1) -> int:
    """Rows that one program sums: a function of the shape alone, so that sums have one order.

    Args:
        span: rows that may be summed together.
        spans: how many such runs there are.
        tile_rows: the least.
        blocks: programs side by side for each chunk.
    """
    chunk = config.chunk
    while chunk > tile_rows and -(-span // chunk) * spans * blocks < config.programs:
        chunk //= 2
    return min(span, max(chunk, tile_rows))
