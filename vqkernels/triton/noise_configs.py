"""Launch configurations of the noise kernels as data: what each runs with, and why.

A row is an estimate unless it says what was measured: it follows from compiled code (registers;
tests/compile) and from the floors at the head of the kernel files.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class BlockConfig:
    """One row.

    Attributes:
        kernel: "noise", "diffuse", "loss", "loss backward", "step", "guided step" or "dynamic
            step".
        block: elements a program, or of each turn of its loop.
        num_warps: Triton's.
        programs: for each multiprocessor, where programs loop; 0 for one program a block.
        chunk: the most elements that one program sums, 0 where nothing is summed.
        reason: why these numbers.
    """

    kernel: str
    block: int
    num_warps: int
    programs: int
    chunk: int
    reason: str


# fmt: off
CONFIGS = (
    BlockConfig("noise", 1024, 4, 0, 0,
                "two counters a thread hide each other's latency, and give 16 bytes of halves"),
    BlockConfig("diffuse", 1024, 4, 0, 0, "as above"),
    BlockConfig("loss", 1024, 4, 0, 8192, "as above; one partial sum for 16 KiB of halves or more"),
    BlockConfig("loss backward", 1024, 4, 0, 0, "as above"),
    BlockConfig("step", 1024, 4, 0, 0, "16 bytes of halves a thread and tensor"),
    BlockConfig("guided step", 1024, 4, 8, 0,
                "32 warps a multiprocessor keep the copy rate; more programs would only repeat the "
                "sums of a rescaled guidance, which each makes for itself"),
    BlockConfig("dynamic step", 2048, 16, 1, 0,
                "each program finds the quantile of its sample for itself: one, of many warps"),
)
# fmt: on
# Fewest elements of a block: 16 bytes of floats for each thread of a warp.
_LEAST = 128
# A sum is cut into more chunks while fewer programs would make it.
_PROGRAMS = 512


def config_of(kernel: str) -> BlockConfig:
    return next(config for config in CONFIGS if config.kernel == kernel)


def block_and_warps(config: BlockConfig, elements: int) -> tuple[int, int]:
    """Cut down for samples of few elements."""
    block = min(config.block, max(_LEAST, triton.next_power_of_2(elements)))
    return block, max(1, config.num_warps * block // config.block)


def chunk_of(config: BlockConfig, span: int, spans: int, block: int) -> int:
    """Elements that one program sums: a function of the shape alone, so that sums have one order.

    `spans` runs of `span` elements are summed, each in whole blocks.
    """
    chunk = config.chunk
    while chunk > block and -(-span // chunk) * spans < _PROGRAMS:
        chunk //= 2
    return chunk
