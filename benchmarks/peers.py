"""Other ways to find the nearest code, each in every configuration its users would try."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Provider, Variant

CHUNK_BYTES = (2**20, 2**23, 2**26)
FAISS_BLAS_THRESHOLDS = (128_000, 20)


@dataclass(frozen=True)
class Problem:
    """Rows `x` `[N, D]` against `codebook` `[K, D]`; `prepared` allows work ahead on the book."""

    x: Tensor
    codebook: Tensor
    metric: str
    prepared: bool


Call = Callable[[], Tensor]


def nearest_code_peers(metric: str) -> tuple[Provider, ...]:
    """The peers that can answer `metric` exactly: a distance has no inner-product form."""
    peers = (_expanded(), _faiss(metric))
    return peers if metric == "dot" else (_cdist(), *peers)


def _rows(problem: Problem) -> Callable[[], Tensor]:
    if problem.metric == "cosine":
        return lambda: F.normalize(problem.x, dim=-1)
    return lambda: problem.x


def _book(problem: Problem) -> Callable[[], Tensor]:
    """The book as its metric wants it: made once when prepared, else in every call."""
    if problem.metric != "cosine":
        return lambda: problem.codebook
    if problem.prepared:
        normalized = F.normalize(problem.codebook, dim=-1)
        return lambda: normalized
    return lambda: F.normalize(problem.codebook, dim=-1)


def _cdist() -> Provider:
    def bind(problem: Problem) -> Call:
        rows, book = _rows(problem), _book(problem)
        return lambda: torch.cdist(rows(), book()).argmin(-1)

    return Provider("cdist", (Variant("default", bind),))


def _expanded() -> Provider:
    """|c|^2 - 2 x.c by one matrix product, whole or in chunks of rows that stay in a cache."""

    def whole(problem: Problem) -> Call:
        rows, book, norms = _rows(problem), _book(problem), _code_norms(problem)
        if problem.metric != "l2":
            return lambda: torch.mm(rows(), book().T).argmax(-1)
        return lambda: torch.addmm(norms(), rows(), book().T, alpha=-2).argmin(-1)

    def chunked(chunk_bytes: int) -> Variant:
        def bind(problem: Problem) -> Call:
            return lambda: _in_chunks(problem, chunk_bytes)

        return Variant(f"chunks of {chunk_bytes // 2**20} MiB", bind)

    return Provider("matmul", (Variant("whole", whole), *map(chunked, CHUNK_BYTES)))


def _code_norms(problem: Problem) -> Callable[[], Tensor]:
    if problem.prepared:
        norms = problem.codebook.square().sum(-1)
        return lambda: norms
    return lambda: problem.codebook.square().sum(-1)


def _in_chunks(problem: Problem, chunk_bytes: int) -> Tensor:
    rows, book = _rows(problem)(), _book(problem)().T
    count, size = rows.shape[0], book.shape[1]
    step = min(count, max(16, chunk_bytes // (4 * size)))
    scores = torch.empty(step, size)
    indices = torch.empty(count, dtype=torch.int64)
    norms = _code_norms(problem)() if problem.metric == "l2" else None
    for start in range(0, count, step):
        part = rows[start : start + step]
        into = scores[: part.shape[0]]
        if norms is None:
            torch.mm(part, book, out=into)
            torch.argmax(into, -1, out=indices[start : start + step])
        else:
            torch.addmm(norms, part, book, alpha=-2, out=into)
            torch.argmin(into, -1, out=indices[start : start + step])
    return indices


def _faiss(metric: str) -> Provider:
    """Exact search, k = 1: an index (its build counts unless prepared) or `faiss.knn` on arrays.

    faiss answers fewer than `distance_compute_blas_threshold` / D queries by a plain loop, which
    on many shapes is an order of magnitude behind its own matrix product or its fused kernel for
    few dimensions; so each form is tried with the default threshold and with a low one.
    """
    forms: list[tuple[str, Callable[[Any, Problem], Call]]] = []
    if metric != "dot":
        forms.append(("IndexFlatL2", _flat_l2))
        forms.append(("knn L2", _knn_l2))
    if metric != "l2":
        forms.append(("IndexFlatIP", _flat_ip))
    variants = []
    for name, form in forms:
        for threshold in FAISS_BLAS_THRESHOLDS:
            variants.append(Variant(f"{name}, blas threshold {threshold}", _on(form, threshold)))
    return Provider("faiss", tuple(variants))


def _on(form: Callable[[Any, Problem], Call], threshold: int) -> Callable[[Problem], Call]:
    def bind(problem: Problem) -> Call:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        search = form(faiss, problem)

        def call() -> Tensor:
            faiss.cvar.distance_compute_blas_threshold = threshold
            return search()

        return call

    return bind


def _flat_l2(faiss: Any, problem: Problem) -> Call:
    return _flat(faiss.IndexFlatL2, problem)


def _flat_ip(faiss: Any, problem: Problem) -> Call:
    return _flat(faiss.IndexFlatIP, problem)


def _flat(kind: Callable[[int], Any], problem: Problem) -> Call:
    rows, book = _rows(problem), _book(problem)

    def build() -> Any:
        index = kind(problem.codebook.shape[-1])
        index.add(book().numpy())
        return index

    if problem.prepared:
        index = build()
        return lambda: torch.from_numpy(index.search(rows().numpy(), 1)[1][:, 0])
    return lambda: torch.from_numpy(build().search(rows().numpy(), 1)[1][:, 0])


def _knn_l2(faiss: Any, problem: Problem) -> Call:
    rows, book = _rows(problem), _book(problem)
    return lambda: torch.from_numpy(faiss.knn(rows().numpy(), book().numpy(), 1)[1][:, 0])
