"""The promise of `nearest_code` judged in float64 on the device, some rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2.0**-24  # fp32
_SCORES_AT_ONCE = 1 << 24


def assert_nearest(x: Tensor, codebook: Tensor, indices: Tensor, metric: str = "l2") -> None:
    """`indices [N]` of `x [N, D]` keep the bound that `nearest_code` states for u = 2^-24, rows and
    codes that are not numbers are left out, and equal codes give the lowest index."""
    assert indices.dtype == torch.int64
    assert indices.shape == x.shape[:-1]
    assert indices.device == x.device
    usable = codebook.isfinite().all(-1)
    hopeless = ~x.isfinite().all(-1) | ~usable.any()
    assert torch.equal(indices == -1, hopeless), "a row without a code, or a code too many"
    codes = torch.where(usable[:, None], codebook, 0.0).double()
    if metric == "cosine":
        codes = torch.nn.functional.normalize(codes, dim=-1, eps=1e-300)
    start = codes.square().sum(-1) / 2 if metric == "l2" else torch.zeros_like(codes[:, 0])
    start = torch.where(usable, start, torch.inf)
    longest = codes.norm(dim=-1).max()

    fine = (~hopeless).nonzero()[:, 0]
    for rows in fine.split(max(1, _SCORES_AT_ONCE // len(codes))):
        chosen, part = indices[rows], x[rows].double()
        assert ((chosen >= 0) & (chosen < len(codes))).all()
        score = start - part @ codes.T
        regret = score.gather(1, chosen[:, None])[:, 0] - score.amin(1)
        bound = allowed(part, longest, metric)
        wrong = ~(regret <= bound)
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {len(rows)} rows outside the bound under {metric}; the worst "
            f"exceeds it {float((regret / bound)[wrong].max()):.3g} times"
        )
    found = indices[fine]
    assert torch.equal(first_of_equals(codebook)[found], found), "not the first of equal codes"


def allowed(rows: Tensor, longest: Tensor, metric: str) -> Tensor:
    """How far a score, half a squared distance under l2, may lie above the least."""
    bound = 4 * (rows.shape[-1] + 8) * UNIT
    size = rows.norm(dim=-1)
    return bound * ((size + longest).square() / 2 if metric == "l2" else size * longest)


def first_of_equals(codebook: Tensor) -> Tensor:
    """For each code the lowest index that holds the same numbers; a NaN equals nothing."""
    _, kind = torch.unique(codebook, dim=0, return_inverse=True)
    index = torch.arange(len(codebook), device=codebook.device)
    lowest = torch.full_like(index, len(codebook)).scatter_reduce(0, kind, index, "amin")
    return lowest[kind]
