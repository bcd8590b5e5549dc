from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vqkernels.reference.ada_layer_norm import ada_layer_norm
from vqkernels.reference.attention import attention
from vqkernels.reference.gated_residual import gated_residual
from vqkernels.reference.qk_norm_rope import qk_norm_rope


def modulated_attention(
    x: Tensor,
    *,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    qkv_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    num_heads: int,
    qk_norm: str = "none",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    eps: float = 1e-6,
    norm: str = "layer",
) -> Tensor:
    h = ada_layer_norm(x, shift=shift, scale=scale, eps=eps, norm=norm)  # [B, N, D]
    qkv = F.linear(h, qkv_weight, qkv_bias)  # [B, N, 3 D]
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    q, k = qk_norm_rope(
        q,
        k,
        q_weight=q_weight,
        k_weight=k_weight,
        cos=cos,
        sin=sin,
        eps=eps,
        norm=qk_norm,
        interleaved=interleaved,
    )  # [B, H, N, d]
    attended = attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    assert isinstance(attended, Tensor)
    branch = F.linear(attended.transpose(1, 2).flatten(2), proj_weight, proj_bias)
    return gated_residual(x, branch, gate=gate)
