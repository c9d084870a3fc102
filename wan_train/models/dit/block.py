"""A DiT block, and the head after the last block.

Legend: B batch, L tokens, T context tokens, d token width, G groups of equally many tokens that share one modulation.
"""

import torch
from torch import Tensor, nn

from wan_train.models.dit.elementwise import PLAIN, Elementwise, Modulation, modulate
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
        self.elementwise: Elementwise = PLAIN

    def forward(self, x: Tensor, context: Tensor, time: Tensor, rope: Tensor) -> Tensor:
        """Return tokens like x (B, L, d) float32, context (B, T, d), time (B, G, 6, d) float32, rope (2, L, 1, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time).unbind(2)
        between, dtype = self.elementwise, context.dtype
        normed = between.normalise(x, self.norm1, Modulation(shift1, scale1), dtype)
        update = self.self_attn(normed, normed, rope)
        x, normed = between.add_normalise(x, update, gate1, self.norm3, None, dtype)
        update = self.cross_attn(normed, context)
        x, normed = between.add_normalise(x, update, None, self.norm2, Modulation(shift2, scale2), dtype, own=True)
        return between.add(x, self.ffn(normed), gate2, own=True)


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
