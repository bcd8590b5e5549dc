"""The self-attention branch of an adaLN-Zero block, in one call.

    h = norm(x) * (1 + scale) + shift
    q, k, v = h qkv_weight^T + qkv_bias, by heads
    out = x + gate * (attention(q, k, v) proj_weight^T + proj_bias)

The matrix products are PyTorch's own; what is between them runs on `ada_layer_norm`,
`attention_qkvpacked` (or `qk_norm_rope` and `attention`) and `gated_residual`. Source:
arXiv:2212.09748, section 3.2 and figure 3.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vqkernels.ops._modulation import check_bias, check_tokens, check_weight
from vqkernels.ops.ada_layer_norm import ada_layer_norm
from vqkernels.ops.attention import attention
from vqkernels.ops.attention_qkvpacked import attention_qkvpacked
from vqkernels.ops.gated_residual import gated_residual
from vqkernels.ops.qk_norm_rope import qk_norm_rope


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
    """`x + gate * self_attention(norm(x) * (1 + scale) + shift)`.

    Args:
        x: tokens `[B, N, D]`, floating point.
        shift, scale, gate: `[B, D]`, or `[B, F, D]` with F dividing N, as in `ada_layer_norm`.
        qkv_weight, qkv_bias: `[3 D, D]` and `[3 D]`: rows of q, k and v, each by heads.
        proj_weight, proj_bias: `[D, D]` and `[D]`.
        num_heads: heads, dividing D.
        qk_norm: "rms" or "layer" normalizes each head's rows of q and k; "none" does not.
        q_weight, k_weight, cos, sin, interleaved: as in `qk_norm_rope`.
        attn_mask, is_causal: as in `attention`.
        eps, norm: as in `ada_layer_norm`; eps also serves `qk_norm`.

    Returns:
        `[B, N, D]` in x's dtype. The products follow autocast as `F.linear` does. What runs on our
        kernels has deterministic gradients.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or choice that does not fit.
    """
    check_tokens("x", x)
    batch, tokens, dim = x.shape
    check_weight("qkv_weight", qkv_weight, 3 * dim, dim, x)
    check_weight("proj_weight", proj_weight, dim, dim, x)
    check_bias("qkv_bias", qkv_bias, qkv_weight)
    check_bias("proj_bias", proj_bias, proj_weight)
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide x's {dim} columns, got {num_heads}")

    h = ada_layer_norm(x, shift=shift, scale=scale, eps=eps, norm=norm)
    qkv = F.linear(h, qkv_weight, qkv_bias).view(batch, tokens, 3, num_heads, dim // num_heads)
    if qk_norm == "none" and all(t is None for t in (q_weight, k_weight, cos, sin)):
        attended = attention_qkvpacked(qkv, attn_mask=attn_mask, is_causal=is_causal)
    else:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d], views
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
        )
        attended = attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal).transpose(1, 2)
    branch = F.linear(attended.reshape(batch, tokens, dim), proj_weight, proj_bias)
    return gated_residual(x, branch, gate=gate)
