"""The transformer block of DiT, with adaLN-Zero modulation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.ops.ada_layer_norm import ada_layer_norm
from vqkernels.ops.attention_qkvpacked import attention_qkvpacked
from vqkernels.ops.bias_gelu import bias_gelu
from vqkernels.ops.gated_residual import gated_residual
from vqkernels.ops.gated_residual_ada_layer_norm import gated_residual_ada_layer_norm


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens `[B, N, D]`, with one packed qkv projection."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads {num_heads}, got {hidden_size}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        return self.proj(attention_qkvpacked(qkv).view(batch, tokens, dim))


class MLP(nn.Module):
    """Two linear layers with tanh-GELU between them; the first bias goes into the GELU."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias, approximate="tanh")
        return self.fc2(hidden)


class DiTBlock(nn.Module):
    """One adaLN-Zero block: tokens `[B, N, D]` and condition `[B, D]` to tokens `[B, N, D]`.

        x = x + gate_1 * attention(norm(x) * (1 + scale_1) + shift_1)
        x = x + gate_2 * mlp(norm(x) * (1 + scale_2) + shift_2)

    `modulated_attention` and `modulated_mlp` in a row, but for the seam: one pass gates the first
    branch's output in and normalizes for the second. The six vectors come from the condition
    through a layer that DiT initializes to zero, so the block starts as the identity. Source:
    arXiv:2212.09748, figure 3. Parameter names are facebookresearch/DiT's.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.attn = SelfAttention(hidden_size, num_heads)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c).chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation

        attended = self.attn(ada_layer_norm(x, shift=shift_msa, scale=scale_msa))
        normed, x = gated_residual_ada_layer_norm(
            x, attended, gate=gate_msa, shift=shift_mlp, scale=scale_mlp
        )
        return gated_residual(x, self.mlp(normed), gate=gate_mlp)


class FinalLayer(nn.Module):
    """Tokens `[B, N, D]` to the pixels of their patches, `[B, N, p * p * out_channels]`."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(ada_layer_norm(x, shift=shift, scale=scale))
