"""The norm in front of an adaLN-Zero block, under the name and parameters that diffusers has."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.ops.ada_layer_norm import ada_layer_norm


class AdaLayerNormZero(nn.Module):
    """Tokens normalized and modulated by a condition, and the block's other four vectors.

        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = linear(silu(emb))
        x = norm(x) * (1 + scale) + shift

    Constructor, forward and parameter names (`linear`) are those of diffusers' class of this name,
    for a condition made outside; its own timestep and label embedding is not supported. Source:
    arXiv:2212.09748, section 3.2.

    Args:
        embedding_dim: D.
        num_embeddings: None.
        norm_type: "layer_norm" or "fp32_layer_norm"; statistics are fp32 in both.
        bias: whether `linear` has one.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int | None = None,
        norm_type: str = "layer_norm",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_embeddings is not None:
            raise NotImplementedError(
                f"num_embeddings is not supported, got {num_embeddings}: embed timestep and label "
                "outside and pass emb"
            )
        if norm_type not in ("layer_norm", "fp32_layer_norm"):
            raise ValueError(
                f"norm_type must be 'layer_norm' or 'fp32_layer_norm', got {norm_type!r}"
            )
        self.linear = nn.Linear(embedding_dim, 6 * embedding_dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: object = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`(x, gate, shift_mlp, scale_mlp, gate_mlp)` of tokens `[B, N, D]` and emb `[B, D]`."""
        if emb is None:
            raise ValueError("emb must be given: a condition [B, D] made from timestep and labels")
        vectors = self.linear(F.silu(emb)).chunk(6, dim=1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors
        x = ada_layer_norm(x, shift=shift, scale=scale)
        return x, gate, shift_mlp, scale_mlp, gate_mlp
