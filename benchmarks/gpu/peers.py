"""Providers of `nearest_code` on a GPU: ours by backend, and what else its users would try."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels
from benchmarks.case import OURS, Provider, Variant

FLASH = "flash-kmeans"
MATMUL = "matmul"
EXACT_MATMUL = "matmul, fp32 scores"
_CHUNK_BYTES = (2**24, 2**28)

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Lookup:
    """Rows `x` `[N, D]` and `codebook` `[K, D]` on one device."""

    x: Tensor
    codebook: Tensor
    metric: str


def ours(backend: str) -> Provider:
    def bind(problem: Lookup) -> Call:
        x, codebook, metric = problem.x, problem.codebook, problem.metric

        def call() -> Tensor:
            with vqkernels.use_backend(backend):
                return vqkernels.nearest_code(x, codebook, metric=metric)

        return call

    return Provider(f"{OURS}-{backend}", (Variant("", bind),))


def launched(block_rows: int, stages: int, *, warpgroups: bool) -> Provider:
    """Our CUDA search with these choices of its launch; the first two are of mma.sync alone."""

    def bind(problem: Lookup) -> Call:
        from vqkernels import cuda

        x, codebook, metric = problem.x, problem.codebook, problem.metric
        return lambda: cuda.nearest_code(
            x,
            codebook,
            metric=metric,
            block_rows=block_rows,
            stages=stages,
            warpgroups=warpgroups,
        )

    choices = f"mma.sync, {block_rows} rows, {stages} stages"
    name = f"cuda, {'wgmma' if warpgroups else choices}"
    return Provider(name, (Variant("", bind),))


def peers(metric: str, *, half: bool, compiled: bool) -> tuple[Provider, ...]:
    """Every peer; one that cannot take the problem fails when it is bound or first called.

    half: x and the book in half precision, whose scores torch keeps in it unless told otherwise.
    """
    found = [Provider(MATMUL, (Variant("whole", _whole), *map(_chunked, _CHUNK_BYTES)))]
    if half:
        found.append(Provider(EXACT_MATMUL, (Variant("whole", _fp32_scores),)))
    elif metric != "dot":
        found.append(Provider("cdist", (Variant("", _cdist),)))
    if compiled:
        found.append(Provider("torch.compile", (Variant("default mode", _compiled),)))
    if metric == "l2":
        variants = (Variant("norms in the call", _flash), Variant("norms given", _flash_norms))
        found.append(Provider(FLASH, variants))
    return tuple(found)


def rounds_scores(provider: str) -> bool:
    """Whether a provider keeps scores in the dtype of half-precision inputs."""
    return provider in (MATMUL, "torch.compile")


def _operands(problem: Lookup) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """x and the book of one dtype, and normalized for cosine, inside the call."""
    x, book = problem.x, problem.codebook
    if x.dtype != book.dtype:
        return lambda: x.to(book.dtype), lambda: book
    if problem.metric == "cosine":
        return lambda: x, lambda: F.normalize(book, dim=-1)
    return lambda: x, lambda: book


def _whole(problem: Lookup) -> Call:
    rows, book = _operands(problem)
    if problem.metric == "l2":
        return lambda: torch.addmm(_norms(book()), rows(), book().T, alpha=-2).argmin(-1)
    return lambda: torch.mm(rows(), book().T).argmax(-1)


def _norms(book: Tensor) -> Tensor:
    return book.square().sum(-1)


def _chunked(chunk_bytes: int) -> Variant:
    def bind(problem: Lookup) -> Call:
        rows, book = _operands(problem)
        size = problem.codebook.shape[0] * problem.codebook.element_size()
        step = max(16, chunk_bytes // size)

        def call() -> Tensor:
            codes = book()
            parts = rows().split(step)
            if problem.metric == "l2":
                norms = _norms(codes)
                found = [torch.addmm(norms, part, codes.T, alpha=-2).argmin(-1) for part in parts]
            else:
                found = [torch.mm(part, codes.T).argmax(-1) for part in parts]
            return torch.cat(found)

        return call

    return Variant(f"chunks of {chunk_bytes // 2**20} MiB", bind)


def _fp32_scores(problem: Lookup) -> Call:
    """Half-precision products whose scores stay in fp32."""
    rows, book = _operands(problem)

    def call() -> Tensor:
        codes = book()
        scores = torch.mm(rows(), codes.T, out_dtype=torch.float32)
        if problem.metric == "l2":
            norms = codes.float().square().sum(-1)
            return torch.sub(norms, scores, alpha=2, out=scores).argmin(-1)
        return scores.argmax(-1)

    return call


def _cdist(problem: Lookup) -> Call:
    rows, book = _operands(problem)
    if problem.metric == "cosine":
        return lambda: torch.cdist(F.normalize(rows(), dim=-1), book()).argmin(-1)
    return lambda: torch.cdist(rows(), book()).argmin(-1)


def _compiled(problem: Lookup) -> Call:
    x, book = problem.x, problem.codebook
    if problem.metric != "l2" or x.dtype != book.dtype:
        raise ValueError("only compiled for l2 and one dtype")

    def search(x: Tensor, book: Tensor) -> Tensor:
        return (book.square().sum(-1) - 2 * (x @ book.T)).argmin(-1)

    compiled = torch.compile(search, fullgraph=True, dynamic=False)
    return lambda: compiled(x, book)


@cache
def _assign() -> tuple[Callable[..., Tensor], bool]:
    """flash-kmeans' assignment, and whether this version wants |x|^2 (older ones do)."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    return euclid_assign_triton, "x_sq" in inspect.signature(euclid_assign_triton).parameters


def _flash(problem: Lookup) -> Call:
    return _flash_call(problem, {})


def _flash_norms(problem: Lookup) -> Call:
    assign, _ = _assign()
    if "c_sq" not in inspect.signature(assign).parameters:
        raise ValueError("this version takes no norms")
    return _flash_call(problem, {"c_sq": problem.codebook.float().square().sum(-1)[None]})


def _flash_call(problem: Lookup, given: dict[str, Any]) -> Call:
    """|x|^2, where wanted, is made ahead: k-means makes it once for all its iterations."""
    assign, wants_rows = _assign()
    x, book = problem.x[None], problem.codebook[None]
    if wants_rows:
        given = {**given, "x_sq": problem.x.float().square().sum(-1)[None]}
    return lambda: assign(x, book, **given)
