"""The float64 oracle of the nearest-code search and the bound that an answer must keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import vqkernels

UNIT = 2.0**-53  # float64: |round(a) - a| <= UNIT |a|


def regret(x: Tensor, codebook: Tensor, indices: Tensor, metric: str = "l2") -> Tensor:
    """By how much each row's chosen code is worse than the best one, in float64.

    l2: squared distance; dot and cosine: similarity. Differences are formed before squaring, so
    the result carries no error of |x|^2.
    """
    cost = _costs(x.double(), codebook.double(), metric)  # [N, K]
    return cost.gather(1, indices[:, None])[:, 0] - cost.amin(1)


def _costs(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    usable = codes.isfinite().all(-1)
    codes = torch.where(usable[:, None], codes, 0.0)
    if metric == "l2":
        # A power of two, so that nothing is rounded and squares of 1e38 and 1e-45 stay in range.
        largest = torch.cat([x.abs().flatten(), codes.abs().flatten()]).max()
        scale = 2.0 ** math.frexp(float(largest))[1]
        distance = torch.cdist(
            x / scale, codes / scale, compute_mode="donot_use_mm_for_euclid_dist"
        )
        cost = (distance * scale).square()
    else:
        norm = codes.norm(dim=-1, keepdim=True)
        unit = codes / torch.where(norm > 0, norm, 1.0)
        cost = -(x @ (codes if metric == "dot" else unit).T)
    return torch.where(usable, cost, torch.inf)


def allowed_regret(x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """The bound that `nearest_code` states for u = 2^-53, per row.

    The CPU kernels decide by s = sum_d c'_d (c'_d / 2 - x'_d) with x' = x - m, c' = c - m, the
    reference by |c|^2 / 2 - x.c, both in float64. Each of the D terms is rounded at most four
    times (two differences, a sum, a product) and D - 1 times in the sum, in whatever order: s is
    off by at most

        e = (D + 3) u (|x'| |c'| + |c'|^2 / 2)  <=  (D + 3) u (|x'| + |c'|)^2 / 2,

    and the code with the least s has an exact s at most 2 e above the least exact one. A squared
    distance is 2 s + |x'|^2: its regret is at most 4 e <= 2 (D + 3) u (|x'| + max |c'|)^2.
    Measuring it in float64, as `regret` does, is off by (D + 5) u (|x'| + |c'|)^2 for each of two
    distances.
    Together that is at most the stated 4 (D + 8) u (|x'| + max |c'|)^2.

    For dot, s = -x.c, off by at most (D + 1) u |x| |c|, twice in the kernel and twice in `regret`;
    for cosine |c| is 1 and its square root and division add 4 u |x|.
    """
    rows, codes = x.double(), codebook.double()
    codes = codes[codes.isfinite().all(-1)]
    bound = 4 * (x.shape[-1] + 8) * UNIT
    if metric == "l2":
        centred = vqkernels.explain("nearest_code", x, codebook).backend == "cpu"
        centre = _centre(codebook) if centred else 0.0
        reach = (rows - centre).norm(dim=-1) + (codes - centre).norm(dim=-1).max()
        return bound * reach.square()
    longest = codes.norm(dim=-1).max() if metric == "dot" else 1.0
    return bound * rows.norm(dim=-1) * longest


def _centre(codebook: Tensor) -> Tensor:
    """The mean of at most 512 finite codes, evenly spread over the book."""
    sampled = codebook[:: max(1, len(codebook) // 512)][:512].double()
    return sampled[sampled.isfinite().all(-1)].mean(0) if len(sampled) else sampled.new_zeros(())


def first_of_equals(codebook: Tensor) -> Tensor:
    """For each code the lowest index that holds the same bits."""
    bits = codebook.contiguous().view(torch.int16 if codebook.element_size() == 2 else torch.int32)
    _, kind = torch.unique(bits, dim=0, return_inverse=True)
    index = torch.arange(len(codebook))
    return torch.full_like(index, len(codebook)).scatter_reduce(0, kind, index, "amin")[kind]


def assert_nearest(x: Tensor, codebook: Tensor, indices: Tensor, metric: str = "l2") -> None:
    """x `[N, D]` and codebook `[K, D]`, all rows and at least one code finite."""
    assert indices.dtype == torch.int64
    assert indices.shape == x.shape[:-1]
    assert ((indices >= 0) & (indices < len(codebook))).all(), "a finite row has no code"
    if len(x) == 0:
        return
    excess, allowed = regret(x, codebook, indices, metric), allowed_regret(x, codebook, metric)
    wrong = ~(excess <= allowed)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {len(x)} rows outside the bound under {metric}; the worst exceeds "
        f"it {float((excess / allowed)[wrong].max()):.3g} times, row {int(wrong.nonzero()[0])}"
    )
    assert torch.equal(first_of_equals(codebook)[indices], indices), "not the first of equal codes"
