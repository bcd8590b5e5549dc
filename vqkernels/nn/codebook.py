"""The state of a vector quantizer: its codes and what it remembers about their use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.ops.code_statistics import code_statistics
from vqkernels.ops.ema_update import ema_update
from vqkernels.ops.nearest_code import nearest_code, pack_codebook
from vqkernels.ops.quantize import QuantizeOutput, quantize


def l2_normalize(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-6)


class Codebook(nn.Module):
    """One codebook, or one a head, learned by gradient or by moving average.

    Rows come as `[..., N, D]` with one book and `[..., G, N, D]` with G books; under cosine
    similarity rows and codes are unit vectors. The buffers are those of vector-quantize-pytorch:
    `embed` `[G, K, D]` (a parameter when learnable), `embed_avg` `[G, K, D]` and `cluster_size`
    `[G, K]` (moving averages of sums and counts), `initted` (bool).
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor
    code_counts: Tensor
    _decay: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 2,
        learnable_codebook: bool = False,
        ema_update: bool = True,
        use_cosine_sim: bool = False,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.kmeans_iters = kmeans_iters
        self.eps = eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.learnable_codebook = learnable_codebook
        self.ema_update = ema_update
        self.use_cosine_sim = use_cosine_sim

        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = l2_normalize(embed) if use_cosine_sim else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

        # Not in the state_dict. `_decay` is a tensor so that a schedule does not recompile.
        self.register_buffer("_decay", torch.tensor(decay), persistent=False)
        self.register_buffer("code_counts", torch.zeros_like(self.cluster_size), persistent=False)
        self._started = not kmeans_init  # `initted` on the host, so that forward need not sync
        self._packed: Tensor | None = None

    @property
    def decay(self) -> float:
        return float(self._decay)

    @decay.setter
    def decay(self, value: float | Tensor) -> None:
        self._decay.copy_(torch.as_tensor(value))

    @property
    def metric(self) -> str:
        return "dot" if self.use_cosine_sim else "l2"  # unit vectors: cosine is dot

    @property
    def book(self) -> Tensor:
        """The codes as the ops take them: `[K, D]`, or `[G, K, D]` for several books."""
        return self.embed[0] if self.num_codebooks == 1 else self.embed

    def forward(
        self, rows: Tensor, mask: Tensor | None, *, gradient: str, update: bool, ema_update: bool
    ) -> QuantizeOutput:
        """Quantize rows, then (if `update`) learn from them."""
        if not self._started:
            self.start_from(rows.detach(), mask)
        book = self.book
        if update and (ema_update or self.threshold_ema_dead_code > 0):
            book = book.clone()  # backward reads the codes of this step, not the updated ones
        out = quantize(
            rows, book, metric=self.metric, mask=mask, gradient=gradient, packed=self._packed
        )
        if update:
            self.code_counts.add_(out.counts.view_as(self.code_counts))
            self.update(rows.detach(), out.indices, ema_update=ema_update)
        return out

    @torch.no_grad()
    def update(self, rows: Tensor, indices: Tensor, *, ema_update: bool) -> None:
        """One step of the moving averages, and new places for codes that have fallen out of use."""
        revive = self.threshold_ema_dead_code > 0
        if not ema_update and not revive:
            return
        counts, sums = self._statistics(rows, indices)
        embed, cluster_size, embed_avg = self._averaged(counts, sums, self._decay.float())
        self.cluster_size.copy_(cluster_size)
        self.embed_avg.copy_(embed_avg)
        if ema_update:
            self.embed.copy_(embed)
        if revive:
            self._revive(rows, indices)

    @torch.no_grad()
    def start_from(self, rows: Tensor, mask: Tensor | None) -> None:
        """Codes from k-means over the first batch, seeded with rows drawn at random.

        The draw depends on torch's random state alone.
        """
        rows = self._per_book(rows).flatten(1, -2).to(self.embed.dtype)  # [G, R, D]
        valid = rows.isfinite().all(-1)  # [G, R]
        if mask is not None:
            valid = valid & self._per_book(mask[..., None]).flatten(1)
        if not torch.compiler.is_compiling() and not bool(valid.any(-1).all()):
            raise ValueError("x must hold at least one finite, unmasked row to start k-means from")

        means = torch.stack([self._draw(r, v) for r, v in zip(rows, valid, strict=True)])
        counts = means.new_zeros(means.shape[:-1], dtype=torch.float32)
        for _ in range(self.kmeans_iters):
            indices = nearest_code(rows, means, metric=self.metric).masked_fill(~valid, -1)
            counts, sums = code_statistics(
                rows, indices, self.codebook_size, books=self.num_codebooks
            )
            new_means = sums / counts.clamp(min=1)[..., None]
            new_means = l2_normalize(new_means) if self.use_cosine_sim else new_means
            means = torch.where(counts[..., None] > 0, new_means.to(means.dtype), means)

        sums = means.float() * counts[..., None]
        embed, cluster_size, embed_avg = self._averaged(counts, sums, torch.zeros_like(self._decay))
        self.embed.copy_(embed)
        self.cluster_size.copy_(cluster_size)
        self.embed_avg.copy_(embed_avg)
        self.initted.fill_(True)
        self._started = True
        self._packed = None

    def pack(self) -> None:
        """Prepare the search for a book that will not change (see `drop_packed`)."""
        if self._started:
            self._packed = pack_codebook(self.book.detach(), metric=self.metric)

    def drop_packed(self) -> None:
        self._packed = None

    def _statistics(self, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        books = None if self.num_codebooks == 1 else self.num_codebooks
        counts, sums = code_statistics(rows, indices, self.codebook_size, books=books)
        return counts.view(self.cluster_size.shape), sums.view(self.embed_avg.shape)

    def _averaged(
        self, counts: Tensor, sums: Tensor, decay: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        embed, cluster_size, embed_avg = ema_update(
            self.embed.detach().float(),
            self.cluster_size.float(),
            self.embed_avg.float(),
            counts,
            sums,
            decay=decay,
            eps=self.eps,
        )
        return l2_normalize(embed) if self.use_cosine_sim else embed, cluster_size, embed_avg

    def _draw(self, rows: Tensor, valid: Tensor) -> Tensor:
        """K of the valid rows `[R, D]` in random order, repeated when there are fewer than K."""
        order = torch.randperm(rows.shape[0], device=rows.device)
        order = order[(~valid[order]).byte().argsort(stable=True)]
        place = torch.arange(self.codebook_size, device=rows.device)
        return rows[order[place % valid.sum().clamp(min=1)]]

    def _revive(self, rows: Tensor, indices: Tensor) -> None:
        """Move codes whose average count fell below the threshold onto rows drawn from the batch.

        No two codes get the same row: with more dead codes than rows, a random part of the dead
        waits for the next batch. Nothing here waits for the device.
        """
        grouped = self._per_book(rows)  # [G, ..., D]
        valid = self._per_book(indices[..., None]).flatten(1) >= 0  # [G, R]
        drawn = min(self.codebook_size, valid.shape[1])
        if drawn == 0:
            return
        lottery = torch.rand(valid.shape, device=rows.device).masked_fill(~valid, -1.0)
        chosen = lottery.topk(drawn, dim=1).indices  # [G, M], valid rows first

        dead = self.cluster_size < self.threshold_ema_dead_code  # [G, K]
        lottery = torch.rand(dead.shape, device=rows.device).masked_fill(~dead, -1.0)
        rank = lottery.argsort(dim=1, descending=True).argsort(dim=1)  # of each code, dead first
        revived = dead & (rank < valid.sum(1, keepdim=True))

        position = chosen.gather(1, rank.clamp(max=drawn - 1))  # [G, K]
        new_codes = _take_rows(grouped, position).to(self.embed.dtype)
        size = float(self.threshold_ema_dead_code)
        self.embed.copy_(torch.where(revived[..., None], new_codes, self.embed))
        self.embed_avg.copy_(torch.where(revived[..., None], new_codes * size, self.embed_avg))
        self.cluster_size.masked_fill_(revived, size)

    def _per_book(self, rows: Tensor) -> Tensor:
        """`[..., N, D]` as `[1, ..., N, D]`, `[..., G, N, D]` as `[G, ..., N, D]`; views."""
        return rows[None] if self.num_codebooks == 1 else rows.movedim(-3, 0)

    def _apply(self, fn: Any, recurse: bool = True) -> Codebook:
        self.drop_packed()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.drop_packed()
        self._started = self.initted.is_meta or bool(self.initted)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # it belongs to this process


def _take_rows(grouped: Tensor, position: Tensor) -> Tensor:
    """Rows of `[G, ..., D]` by flat position `[G, M]` within each group, as `[G, M, D]`."""
    book = torch.arange(grouped.shape[0], device=grouped.device)[:, None]
    coordinates: list[Tensor] = []
    for size in reversed(grouped.shape[1:-1]):
        coordinates.append(position % size)
        position = position // size
    return grouped[(book, *reversed(coordinates))]
