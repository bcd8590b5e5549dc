"""Exponential moving average of a codebook, from the statistics of one step."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.backends import select
from vqkernels.ops._checks import check_codebook, check_labels, check_same_device
from vqkernels.ops._library import define, fake, not_differentiable
from vqkernels.reference import ema_update as reference

_ema_update = define(
    "ema_update(Tensor codebook, Tensor cluster_size, Tensor embed_sum, Tensor counts, Tensor sums,"
    " Tensor decay, float eps) -> (Tensor, Tensor, Tensor)",
    lambda codebook, cluster_size, embed_sum, counts, sums, decay, eps: reference.ema_update(
        codebook, cluster_size, embed_sum, counts, sums, decay=decay, eps=eps
    ),
)


@fake(_ema_update)
def _(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        codebook.new_empty(codebook.shape),
        cluster_size.new_empty(cluster_size.shape),
        embed_sum.new_empty(embed_sum.shape),
    )


not_differentiable(_ema_update, "an EMA codebook has no gradient; detach its tensors")


def ema_update(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: Tensor | float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One EMA step of a codebook, returned as new tensors.

        cluster_size' = decay * cluster_size + (1 - decay) * counts
        embed_sum'    = decay * embed_sum    + (1 - decay) * sums
        codebook'     = embed_sum' / smoothed(cluster_size')

    with Laplace smoothing `(n + eps) / (sum(n) + K eps) * sum(n)`.
    Source: van den Oord et al., arXiv:1711.00937, appendix A.1.

    Args:
        codebook: `[K, D]` or `[G, K, D]`.
        cluster_size, counts: float32 `[K]` or `[G, K]`.
        embed_sum, sums: float32, the codebook's shape.
        decay: in [0, 1]; a tensor where it changes from step to step under `torch.compile`.
        eps: smoothing, so that a code that was never chosen stays finite.

    Returns:
        (codebook, cluster_size, embed_sum), new tensors.
    """
    check_codebook(codebook)
    statistics = (torch.float32,)
    check_labels("cluster_size", cluster_size, codebook.shape[:-1], statistics)
    check_labels("counts", counts, codebook.shape[:-1], statistics)
    check_labels("embed_sum", embed_sum, codebook.shape, statistics)
    check_labels("sums", sums, codebook.shape, statistics)
    for name, value in (
        ("cluster_size", cluster_size),
        ("embed_sum", embed_sum),
        ("counts", counts),
        ("sums", sums),
    ):
        check_same_device(name, value, "codebook", codebook)
    if not isinstance(decay, Tensor):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        decay = torch.tensor(decay, dtype=torch.float32, device=codebook.device)
    if decay.numel() != 1 or decay.dtype != torch.float32:
        raise ValueError(
            f"decay must be a number or one float32 value, got {decay.dtype} {list(decay.shape)}"
        )
    check_same_device("decay", decay, "codebook", codebook)
    backend = select("ema_update", codebook, cluster_size)
    new_codebook, new_size, new_sum = _ema_update(
        codebook, cluster_size, embed_sum, counts, sums, decay, eps, backend
    )
    return new_codebook, new_size, new_sum
