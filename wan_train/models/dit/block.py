"""A DiT block, and the head after the last block.

Legend: B batch, L tokens, T context tokens, d token width, G groups of equally many tokens that share one modulation.
"""

import torch
from torch import Tensor, nn

from wan_train.models.dit.layers import GELU, Attention, DitConfig, ImageAttention
from wan_train.models.dit.norms import LayerNorm
from wan_train.precision import Linear


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; self-attention and feed-forward are modulated by time."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = LayerNorm(dim, config.eps)
        self.cross_attn = ImageAttention(config) if config.image_dim else Attention(config)
        self.norm2 = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(Linear(dim, config.ffn_dim), GELU(), Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, context: Tensor, time: Tensor, rope: Tensor) -> Tensor:
        """Return tokens like x (B, L, d) float32, context (B, T, d), time (B, G, 6, d) float32, rope (2, L, 1, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time).unbind(2)
        dtype = context.dtype
        modulated = modulate(self.norm1(x), shift1, scale1).to(dtype)
        x = gated(x, self.self_attn(modulated, modulated, rope), gate1)
        x = x + self.cross_attn(self.norm3(x).to(dtype), context)
        return gated(x, self.ffn(modulate(self.norm2(x), shift2, scale2).to(dtype)), gate2)


class Head(nn.Module):
    """Project tokens to the velocity of their patches, in float32."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        pt, ph, pw = config.patch_size
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear(config.dim, pt * ph * pw * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return (B, L, patch*C) of x (B, L, d) and time (B, G, d)."""
        shift, scale = (self.modulation.float() + time.unsqueeze(2)).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (B, L, d) * (1 + scale) + shift with shift and scale (B, G, d) for G groups of equally many tokens."""
    grouped = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), grouped, 1 + scale.unsqueeze(2)).flatten(1, 2)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Return x + update * gate in float32, with gate (B, G, d)."""
    groups = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, groups), update.unflatten(1, groups).float(), gate.unsqueeze(2)).flatten(1, 2)
