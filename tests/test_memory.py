"""No op allocates anything like N x K."""

from __future__ import annotations

from pathlib import Path

import pytest
from _helpers.processes import output_of

from vqkernels import native

PEAK = """
import sys, torch, vqkernels
torch.set_num_threads(2)
rows, dim, codes, metric = {0}, {1}, {2}, "{3}"
x, codebook = torch.randn(rows, dim), torch.randn(codes, dim)
for call in (vqkernels.nearest_code, vqkernels.quantize):
    call(x[:32], codebook[:64], metric=metric)  # loads what is loaded lazily

def kilobytes(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1])

for call in (vqkernels.nearest_code, vqkernels.quantize):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again at the present size
    before = kilobytes("VmRSS")
    call(x, codebook, metric=metric)
    print(kilobytes("VmHWM") - before)
"""


def can_measure() -> bool:
    return Path("/proc/self/clear_refs").exists()


@pytest.mark.skipif(not can_measure(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.skipif(native.problem is not None, reason=str(native.problem))
@pytest.mark.parametrize(
    ("rows", "dim", "codes", "metric"), [(4096, 8, 65536, "l2"), (2048, 64, 32768, "cosine")]
)
def test_peak_memory(rows: int, dim: int, codes: int, metric: str) -> None:
    scores, book = rows * codes * 4, codes * dim * 4
    # A packed book with its bytes and norms, the results, and room for threads and the allocator.
    allowed = 1.5 * book + codes * 8 + rows * (dim + 4) * 8 + (24 << 20)
    assert allowed < scores / 4, "this shape cannot tell an N x K matrix apart"
    grown = [int(line) * 1024 for line in output_of(PEAK.format(rows, dim, codes, metric)).split()]
    assert len(grown) == 2
    assert max(grown) <= allowed, f"{max(grown) / 2**20:.0f} MiB more at the peak"
