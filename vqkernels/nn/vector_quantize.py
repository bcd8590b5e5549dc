"""Vector quantization as a layer, with the interface of the package vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqkernels.nn._arguments import (
    as_mask,
    check_arguments,
    for_codebook,
    is_distributed,
    refuse,
)
from vqkernels.nn.codebook import Codebook, l2_normalize
from vqkernels.ops.gather_codes import gather_codes
from vqkernels.ops.quantize import QuantizeOutput


class LossBreakdown(NamedTuple):
    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """Replace vectors by their nearest codes and learn the codes.

    Constructor arguments, forward results and `state_dict` are those of vector-quantize-pytorch
    1.32; an argument that is not supported raises NotImplementedError with its name.

    Sources: van den Oord et al., arXiv:1711.00937 (quantization, commitment loss, EMA codebook);
    Yu et al., arXiv:2110.04627 (cosine similarity, low-dimensional codes); Zeghidour et al.,
    arXiv:2107.03312 (k-means start, revival of dead codes); Fifty et al., arXiv:2410.06424
    (rotation trick).

    Args:
        dim: size of the vectors.
        codebook_size: number of codes K.
        codebook_dim: size of a code; if `heads * codebook_dim != dim`, linear layers project in
            and out. dim by default.
        heads: codes a vector, each for one slice of it.
        separate_codebook_per_head: one book a head instead of one for all.
        decay: of the moving averages; `_codebook.decay` may change between steps.
        eps: smoothing of the cluster sizes.
        freeze_codebook: do not learn; in eval() such a book is prepared once for fast search.
        kmeans_init, kmeans_iters: start from k-means over the first batch.
        use_cosine_sim: unit vectors and unit codes, nearest by cosine.
        layernorm_after_project_in: as it says.
        threshold_ema_dead_code: codes whose average count falls below it move onto random rows of
            the batch; 0 leaves them.
        channel_last: sequences are `[B, N, dim]`, otherwise `[B, dim, N]`.
        accept_image_fmap, accept_3d_fmap: inputs are `[B, dim, H, W]`, `[B, dim, D, H, W]`.
        commitment_weight: of mean((x - code)^2) in the returned loss.
        rotation_trick: rotate the gradient with the code (the default where dim > 1); False is
            the plain straight-through gradient.
        ema_update: learn the codes by moving average (the default).
        learnable_codebook: the codes are a parameter, trained by the commitment loss; needs
            `ema_update=False`.
        return_zeros_for_masked_padding: zeros at masked positions, otherwise the input.
        route_gradients_to_input: False stops the gradient of `quantized` towards x.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., Any] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        super().__init__()
        refuse(
            commitment_use_cross_entropy_loss=commitment_use_cross_entropy_loss,
            orthogonal_reg_weight=orthogonal_reg_weight,
            codebook_diversity_loss_weight=codebook_diversity_loss_weight,
            stochastic_sample_codes=stochastic_sample_codes,
            straight_through=straight_through,
            directional_reparam=directional_reparam,
            sync_codebook=is_distributed() if sync_codebook is None else sync_codebook,
            vq_bridge=vq_bridge,
            manual_ema_update=manual_ema_update,
            in_place_codebook_optimizer=in_place_codebook_optimizer,
            affine_param=affine_param,
            sync_update_v=sync_update_v,
        )
        ema_update = True if ema_update is None else ema_update
        learnable_codebook = bool(learnable_codebook)
        check_arguments(
            dim, codebook_size, heads, accept_image_fmap, accept_3d_fmap, use_cosine_sim,
            ema_update, learnable_codebook,
        )  # fmt: skip

        self.dim = dim
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.codebook_size = codebook_size
        self.commitment_weight = commitment_weight
        self.learnable_codebook = learnable_codebook
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input

        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)

        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            learnable_codebook=learnable_codebook,
            ema_update=ema_update,
            use_cosine_sim=use_cosine_sim,
        )

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes: `[K, d]`, or `[heads, K, d]` with separate books."""
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self.codebook.copy_(codes)
        self._codebook.drop_packed()

    @property
    def usage(self) -> Tensor:
        """Share of the codes chosen at least once in training since `reset_usage()`, `[]` or
        `[heads]`; a tensor, so that reading it does not wait for the device."""
        return self._per_head((self._codebook.code_counts > 0).float().mean(-1))

    @property
    def perplexity(self) -> Tensor:
        """exp(entropy) of how often each code was chosen in training since `reset_usage()`,
        `[]` or `[heads]`: K when all codes are chosen equally often."""
        counts = self._codebook.code_counts
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        return self._per_head(torch.special.entr(share).sum(-1).exp())

    def reset_usage(self) -> None:
        self._codebook.code_counts.zero_()

    def train(self, mode: bool = True) -> VectorQuantize:
        super().train(mode)
        self._codebook.drop_packed()
        if not mode and self.freeze_codebook and not self.learnable_codebook:
            self._codebook.pack()
        return self

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of the indices that `forward` returns, in its layout but before `project_out`;
        index -1 gives zeros."""
        if self.heads == 1:
            codes = gather_codes(self._codebook.book, indices)
        elif self.separate_codebook_per_head:
            codes = gather_codes(self._codebook.book, indices.transpose(-2, -1))
            codes = self._merge_heads(codes)
        else:
            codes = gather_codes(self._codebook.book, indices).flatten(-2)
        return codes if self._is_channel_last else codes.movedim(-1, 1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for these indices."""
        codes = self.get_codes_from_indices(indices)
        if self._is_channel_last:
            return self.project_out(codes)
        return self.project_out(codes.movedim(1, -1)).movedim(-1, 1)

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[..., Any] | None = None,
        ema_update_weight: Tensor | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LossBreakdown]:
        """Quantize x and, in training, learn from it.

        Args:
            x: `[B, N, dim]`, `[B, dim]`, or channel-first as the constructor says; read in place.
            mask: bool, x's shape without its channels. False: no code is chosen (index -1),
                nothing is learned.
            lens: `[B]` valid lengths, instead of a mask.
            freeze_codebook: overrides the constructor's.
            return_loss_breakdown: also return the unweighted losses by name.
            ema_update: overrides the constructor's.

        Returns:
            (quantized, indices, loss): quantized in x's shape and dtype; int64 indices, x's shape
            without channels, with a last dimension `heads` if there are several; a scalar loss,
            `commitment_weight * mean((x - code)^2)` in training and 0 in eval.
        """
        refuse(
            indices=indices,
            topk=topk,
            sample_codebook_temp=sample_codebook_temp,
            codebook_transform_fn=codebook_transform_fn,
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
        )
        single = x.dim() == 2
        tokens = x[:, None] if single else x
        tokens = tokens if single or self._is_channel_last else tokens.movedim(1, -1)
        mask = as_mask(mask, lens, tokens, single)
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook

        rows = self._split_heads(self.project_in(tokens))
        rows = l2_normalize(rows) if self.use_cosine_sim else rows
        rows = for_codebook(rows, self._codebook.embed)
        routed = self.training and self.route_gradients_to_input and x.requires_grad
        out = self._codebook(
            rows,
            self._mask_for_rows(mask, rows),
            gradient=self._gradient if routed else "none",
            update=self.training and not freeze,
            ema_update=self._codebook.ema_update if ema_update is None else ema_update,
        )
        commitment = self._commitment(out, tokens, mask, freeze)
        codes = self._codes_with_gradient(out, rows, routed)

        quantized = self.project_out(self._merge_heads(codes.to(x.dtype)))
        if mask is not None:
            padding = 0.0 if self.return_zeros_for_masked_padding else tokens
            quantized = torch.where(mask[..., None], quantized, padding)
        found = self._merge_indices(out.indices)
        if single:
            quantized, found = quantized[:, 0], found[:, 0]
        elif not self._is_channel_last:
            quantized = quantized.movedim(-1, 1)

        loss = commitment * self.commitment_weight
        if not return_loss_breakdown:
            return quantized, found, loss
        zero = torch.zeros_like(loss)
        return quantized, found, loss, LossBreakdown(commitment, zero, zero, zero)

    def _commitment(
        self, out: QuantizeOutput, tokens: Tensor, mask: Tensor | None, freeze: bool
    ) -> Tensor:
        if not self.training or self.commitment_weight <= 0:
            return torch.zeros_like(out.commitment_loss)
        if (
            mask is not None
            and self.use_cosine_sim
            and self.heads == 1
            and not self.has_projections
        ):
            # With a mask, vector-quantize-pytorch compares unit codes to x before normalization.
            kept = mask[..., None]
            difference = torch.where(kept, tokens.float() - out.quantized.detach().float(), 0.0)
            return difference.square().sum() / (kept.sum() * self.dim).clamp(min=1)
        loss = out.commitment_loss
        if self.learnable_codebook and not freeze:
            loss = loss + (out.codebook_loss - out.codebook_loss.detach())  # adds its gradient
        return loss

    def _codes_with_gradient(self, out: QuantizeOutput, rows: Tensor, routed: bool) -> Tensor:
        if routed:
            return out.quantized
        if self.learnable_codebook:
            codes = gather_codes(self._codebook.book, out.indices).to(rows.dtype)
            return torch.where(out.indices[..., None] >= 0, codes, out.quantized)
        return out.quantized

    @property
    def _gradient(self) -> str:
        return "rotation" if self.rotation_trick else "straight_through"

    @property
    def _is_channel_last(self) -> bool:
        return self.channel_last and not self.accept_image_fmap and not self.accept_3d_fmap

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """`[..., N, h d]` to `[..., h, N, d]` for separate books, `[..., N, h, d]` for one."""
        if self.heads == 1:
            return tokens
        rows = tokens.unflatten(-1, (self.heads, -1))
        return rows.transpose(-3, -2) if self.separate_codebook_per_head else rows

    def _merge_heads(self, codes: Tensor) -> Tensor:
        if self.heads == 1:
            return codes
        codes = codes.transpose(-3, -2) if self.separate_codebook_per_head else codes
        return codes.flatten(-2)

    def _merge_indices(self, indices: Tensor) -> Tensor:
        """Of rows to `[..., N]`, or `[..., N, h]`."""
        if self.heads > 1 and self.separate_codebook_per_head:
            return indices.transpose(-2, -1)
        return indices

    def _mask_for_rows(self, mask: Tensor | None, rows: Tensor) -> Tensor | None:
        if mask is None or self.heads == 1:
            return mask
        mask = mask[..., None, :] if self.separate_codebook_per_head else mask[..., None]
        return mask.expand(rows.shape[:-1])

    def _per_head(self, value: Tensor) -> Tensor:
        return value if self.separate_codebook_per_head else value[0]
