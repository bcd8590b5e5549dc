"""Whether results are right: a float64 search for indices, float64 results for the rest, and the
error that rounding may explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import OURS, Check

UNIT_ROUNDOFF = 2.0**-24
SAMPLED_ROWS = 256
DISPUTED_ROWS = 256
SCORES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Oracle:
    """Float64 scores of one nearest-code problem, lower is nearer, and the error fp32 may make.

    `nearest_code` promises a score within 4 (D + 8) u S of the minimum, u = 2^-24, where S is
    (|x| + max_k |c_k|)^2 for l2 and |x| max_k |c_k| otherwise. That is twice what the error bound
    of an fp32 dot product in any order (Higham, Accuracy and Stability of Numerical Algorithms,
    3.1) gives for the two scores compared. The peers add |x|^2, take roots or normalize first,
    and get twice as much.
    """

    x: Tensor
    codebook: Tensor
    metric: str

    @classmethod
    def of(cls, x: Tensor, codebook: Tensor, metric: str) -> Oracle:
        x, codebook = x.double(), codebook.double()
        if metric == "cosine":
            x, codebook = F.normalize(x, dim=-1), F.normalize(codebook, dim=-1)
        return cls(x, codebook, metric)

    def scores(self, rows: Tensor) -> Tensor:
        products: Tensor = self.x[rows] @ self.codebook.T
        if self.metric == "l2":
            return products.mul_(-2.0).add_(self.codebook.square().sum(-1))
        return products.neg_()

    def scale(self, rows: Tensor) -> Tensor:
        """S: no score is larger."""
        x_norm = self.x[rows].norm(dim=-1)
        largest = self.codebook.norm(dim=-1).max()
        return (x_norm + largest).square() if self.metric == "l2" else x_norm * largest

    def allowance(self, rows: Tensor) -> Tensor:
        allowance: Tensor = 4 * (self.x.shape[-1] + 8) * UNIT_ROUNDOFF * self.scale(rows)
        return allowance


def _rows_to_check(outputs: list[Tensor], seed: int) -> Tensor:
    """A random sample of rows, and rows on which the providers do not agree."""
    count = outputs[0].numel()
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(count, generator=generator)[:SAMPLED_ROWS].to(outputs[0].device)
    disputed = torch.zeros(count, dtype=torch.bool, device=outputs[0].device)
    for other in outputs[1:]:
        disputed |= other != outputs[0]
    rows = torch.cat([sample, disputed.nonzero().flatten()[:DISPUTED_ROWS]])
    return rows.unique()


def check_indices(
    x: Tensor,
    codebook: Tensor,
    metric: str,
    outputs: Mapping[str, Tensor],
    *,
    seed: int = 0,
    every_row: bool = False,
    rounding: Mapping[str, float] | None = None,
) -> dict[str, Check]:
    """Compares every provider's indices with a float64 search.

    Looks at a sample of rows and at rows on which providers disagree. A choice is wrong when its
    float64 score exceeds the minimum by more than `Oracle.allowance`.

    Args:
        x: `[N, D]`; codebook: `[K, D]`; outputs: indices int64 `[N]` of each provider, on x's
            device.
        every_row: look at all rows, where the device is fast enough.
        rounding: unit roundoff of the scores of a provider that rounds them to half precision.
    """
    checks: dict[str, Check] = {}
    well_formed: dict[str, Tensor] = {}
    for name, indices in outputs.items():
        refusal = _malformed(indices, x.shape[0], codebook.shape[0])
        if refusal:
            checks[name] = Check(x.shape[0], x.shape[0], refusal)
        else:
            well_formed[name] = indices
    if not well_formed or x.shape[0] == 0:
        return checks | {name: Check(0, 0) for name in well_formed}

    oracle = Oracle.of(x, codebook, metric)
    if every_row:
        rows = torch.arange(x.shape[0], device=x.device)
    else:
        rows = _rows_to_check(list(well_formed.values()), seed)
    mismatches = dict.fromkeys(well_formed, 0)
    outside = dict.fromkeys(well_formed, 0)
    for part in torch.split(rows, max(1, SCORES_AT_ONCE // codebook.shape[0])):
        scores = oracle.scores(part)
        allowance, scale = oracle.allowance(part), oracle.scale(part)
        least, best = scores.min(dim=-1)
        for name, indices in well_formed.items():
            chosen = indices[part]
            gap = scores.gather(-1, chosen[:, None])[:, 0] - least
            mismatches[name] += int((chosen != best).sum())
            allowed = allowance * (1 if name.startswith(OURS) else 2)
            # A score of at most `scale` is rounded, and so may be its terms, for both codes.
            allowed = allowed + 4 * (rounding or {}).get(name, 0.0) * scale
            outside[name] += int((gap > allowed).sum())
    for name in well_formed:
        wrong = outside[name]
        refusal = f"{wrong} of {rows.numel()} rows outside the rounding bound" if wrong else ""
        checks[name] = Check(rows.numel(), mismatches[name], refusal)
    return checks


def _malformed(indices: Tensor, rows: int, codebook_size: int) -> str:
    if indices.dtype != torch.int64 or tuple(indices.shape) != (rows,):
        return f"expected int64 indices [{rows}], got {indices.dtype} {list(indices.shape)}"
    bad = int(((indices < 0) | (indices >= codebook_size)).sum())
    return f"{bad} indices outside 0..{codebook_size - 1}" if bad else ""


def judged(
    exact: Sequence[Tensor],
    outputs: Mapping[str, Sequence[Tensor]],
    peer: str,
    fp32_floor: float,
    rows: int,
) -> dict[str, Check]:
    """Every provider's results against float64: at most twice the peer's largest error and an ulp
    of the largest number; in fp32 `fp32_floor` of it."""
    errors = {
        name: [float((t.double() - e).abs().max()) for t, e in zip(output, exact, strict=True)]
        for name, output in outputs.items()
    }
    checks = {}
    for name, found in errors.items():
        refusal = ""
        for i, error in enumerate(found):
            largest, dtype = float(exact[i].abs().max()), outputs[name][i].dtype
            of_peer = errors[peer][i] if peer in errors else 0.0
            allowed = 2 * of_peer + torch.finfo(dtype).eps * largest
            if dtype == torch.float32:
                allowed = max(allowed, fp32_floor * largest)
            if not error <= allowed:
                refusal = f"result {i} is off by {error:.2g}, allowed {allowed:.2g}"
        checks[name] = Check(rows, 0, refusal)
    return checks
