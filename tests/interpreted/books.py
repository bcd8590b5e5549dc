"""Data and the float64 judgement for the search tests."""

from __future__ import annotations

import torch
from torch import Tensor

# Twice the unit roundoff of fp32: tensor cores may truncate instead of rounding.
_U = 2.0**-23


def scores(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """float64 `[R, K]`, the smallest is nearest; +inf for a code that must not be chosen."""
    x, codes = x.double(), codebook.double()
    usable = codes.isfinite().all(-1)
    codes = torch.where(usable[:, None], codes, 0.0)
    if metric == "cosine":
        codes = torch.nn.functional.normalize(codes, dim=-1, eps=1e-300)
    start = codes.square().sum(-1) / 2 if metric == "l2" else codes.new_zeros(len(codes))
    return torch.where(usable, start, torch.inf)[None] - x @ codes.T


def regret_bound(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """How far a chosen score may lie above the best: rounding of D products and their sum, once
    for the chosen and once for the best code; the split of fp32 drops 2^-23 of each product."""
    x, codes = x.double(), codebook.double()
    codes = codes[codes.isfinite().all(-1)]
    if metric == "cosine":
        codes = torch.nn.functional.normalize(codes, dim=-1, eps=1e-300)
    longest = codes.norm(dim=-1).max() if len(codes) else codes.new_zeros(())
    size = x.norm(dim=-1) * longest + (longest**2 / 2 if metric == "l2" else 0.0)
    return 2 * (x.shape[-1] + 8) * _U * size + 1e-37


def judge(indices: Tensor, x: Tensor, codebook: Tensor, metric: str) -> None:
    """Assert that `indices [R]` of `x [R, D]` keep the numerics contract."""
    score = scores(x, codebook, metric)
    hopeless = ~x.isfinite().all(-1) | ~codebook.isfinite().all(-1).any()
    assert torch.equal(indices == -1, hopeless), (indices == -1).nonzero()
    fine = ~hopeless
    if not fine.any():
        return
    chosen = indices[fine]
    assert ((chosen >= 0) & (chosen < len(codebook))).all()
    picked = score[fine].gather(1, chosen[:, None])[:, 0]
    regret = picked - score[fine].min(1).values
    bound = regret_bound(x[fine], codebook, metric)
    assert (regret <= bound).all(), (regret / bound).max()
    _assert_first_of_equals(chosen, codebook)


def _assert_first_of_equals(chosen: Tensor, codebook: Tensor) -> None:
    equal = (codebook[chosen][:, None] == codebook[None]).all(-1)  # [R, K]
    assert torch.equal(equal.int().argmax(1), chosen), "not the lowest of equal codes"
