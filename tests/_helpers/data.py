"""Rows and codebooks that are hard in one way each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _gaussian(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)


def _clustered(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Encoder outputs late in training: every row lies close to a code."""
    rows, codes = _gaussian(n, k, d, g)
    return codes[torch.randint(k, (n,), generator=g)] + 0.01 * rows, codes


def _duplicated(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every code lies several times in the book, in random places."""
    rows, codes = _gaussian(n, k, d, g)
    return rows, codes[torch.randint(max(1, k // 3), (k,), generator=g)]


def _collapsed(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, codes = _gaussian(n, k, d, g)
    return rows, codes[:1].repeat(k, 1)


def _tiny(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The usual initial book, uniform(-1/K, 1/K): codes far smaller than rows."""
    rows, codes = torch.randn(n, d, generator=g), torch.rand(k, d, generator=g)
    return rows, (2 * codes - 1) / k


def _offset(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, codes = _gaussian(n, k, d, g)
    return rows + 10, codes + 10


def _far_offset(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """An offset that eats half of the mantissa."""
    rows, codes = _gaussian(n, k, d, g)
    return rows + 3000, codes + 3000


def _huge(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, codes = _gaussian(n, k, d, g)
    return rows * 1e15, codes * 1e15


def _minute(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, codes = _gaussian(n, k, d, g)
    return rows * 1e-15, codes * 1e-15


def _lognormal(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Norms of rows and codes spread over several orders of magnitude."""
    rows, codes = _gaussian(n, k, d, g)
    row_norm = torch.exp(2 * torch.randn(n, 1, generator=g))
    return rows * row_norm, codes * torch.exp(2 * torch.randn(k, 1, generator=g))


def _one_dimension(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """One dimension 50 times as wide as the others."""
    rows, codes = _gaussian(n, k, d, g)
    wide = torch.ones(d)
    wide[d // 2] = 50
    return rows * wide, codes * wide


def _outlier(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """One code and one row far out: they must not spoil the others."""
    rows, codes = _gaussian(n, k, d, g)
    codes[k // 2] *= 1e4
    if n:
        rows[n // 2] *= 1e4
    return rows, codes


def _midpoints(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows halfway between any two codes."""
    _, codes = _gaussian(n, k, d, g)
    pairs = torch.randint(k, (2, n), generator=g)
    return (codes[pairs[0]] + codes[pairs[1]]) / 2, codes


def _neighbours(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows halfway between a code and the code nearest to it: the two best are all but tied."""
    _, codes = _gaussian(n, k, d, g)
    chosen = torch.randint(k, (n,), generator=g)
    apart = torch.cdist(codes[chosen], codes)
    other = apart.scatter(1, chosen[:, None], torch.inf).argmin(1)
    return (codes[chosen] + codes[other]) / 2, codes


def _lattice(n: int, k: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Small integers: exact ties between different codes, and equal codes."""
    rows = torch.randint(-2, 3, (n, d), generator=g)
    return rows.float(), torch.randint(-2, 3, (k, d), generator=g).float()


KINDS: dict[str, Callable[[int, int, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "gaussian": _gaussian,
    "clustered": _clustered,
    "duplicated": _duplicated,
    "collapsed": _collapsed,
    "tiny": _tiny,
    "offset": _offset,
    "far_offset": _far_offset,
    "huge": _huge,
    "minute": _minute,
    "lognormal": _lognormal,
    "one_dimension": _one_dimension,
    "outlier": _outlier,
    "midpoints": _midpoints,
    "neighbours": _neighbours,
    "lattice": _lattice,
}


def make(kind: str, rows: int, codes: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x `[rows, dim]` and codebook `[codes, dim]`, fp32, the same for the same arguments."""
    return KINDS[kind](rows, codes, dim, generator(seed))
