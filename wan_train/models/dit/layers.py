"""Attention, image attention and image embedding of a DiT.

Legend: B batch, S L tokens, I image tokens, N heads, D head width, d = N*D token width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan_train.models.dit.attention import Attend, attend_torch
from wan_train.models.dit.norms import LayerNorm, RMSNorm
from wan_train.models.variants import TEXT_LENGTH
from wan_train.precision import Linear


@dataclass(frozen=True)
class DitConfig:
    """Geometry of a DiT; everything but `num_heads` can be inferred from its tensors.

    `image_dim` is the width of CLIP tokens, 0 for a model without them, and `image_positions` the number of tokens with
    a learned position embedding, 0 for none. For control models `reference` is true if they take a reference image,
    `camera_dim` and `vace_dim` are the channels of a camera map and of the VACE context (0 for none), `vace_layers` are
    the blocks after which VACE hints are added, and `motion` is true with a motion controller.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    image_dim: int = 0
    image_positions: int = 0
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    reference: bool = False
    camera_dim: int = 0
    vace_dim: int = 0
    vace_layers: tuple[int, ...] = ()
    motion: bool = False

    @property
    def num_extra_channels(self) -> int:
        """Return the number of input channels after the noisy latents."""
        return self.in_dim - self.out_dim

    @property
    def allows_missing_clip(self) -> bool:
        """Return whether missing CLIP tokens are replaced by zeros.

        Control models were trained this way; they have no mask channels, so their extra channels are a multiple of the
        latent channels.
        """
        return bool(self.image_dim) and self.num_extra_channels % self.out_dim == 0


class Attention(nn.Module):
    """Self-attention, or cross-attention to the text (including padding, as the model was trained)."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.attend: Attend = attend_torch
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def forward(self, x: Tensor, source: Tensor, rope: Tensor | None = None) -> Tensor:
        """Return (B, L, d): x (B, L, d) attends to source (B, S, d), both rotated by `rope` (2, L, 1, D) if given."""
        query = self.norm_q(self.q(x), self.num_heads, rope)
        key, value = self.read(source) if rope is None else self.read(source, rope)
        return self.o(rearrange(self.attend(query, key, value), "B L N D -> B L (N D)"))

    def read(self, source: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return keys and values (B, S, N, D) of source (B, S, d)."""
        key = self.norm_k(self.k(source), self.num_heads, rope)
        return key, rearrange(self.v(source), "B S (N D) -> B S N D", N=self.num_heads)


class ImageAttention(Attention):
    """Cross-attention to the text and, with separate keys and values, to the image tokens that precede it."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__(config)
        self.k_img, self.v_img = (Linear(config.dim, config.dim) for _ in range(2))
        self.norm_k_img = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, source: Tensor, rope: Tensor | None = None) -> Tensor:
        """Return (B, L, d): x (B, L, d) attends to source (B, I+512, d), whose last 512 tokens are the text."""
        query = self.norm_q(self.q(x), self.num_heads, rope)
        key, value, image_key, image_value = self.read(source)
        seen = self.attend(query, key, value) + self.attend(query, image_key, image_value)
        return self.o(rearrange(seen, "B L N D -> B L (N D)"))

    def read(self, source: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return keys and values (B, 512, N, D) of the text in source (B, I+512, d), then those (B, I, N, D) of the
        images."""
        images, text = source[:, :-TEXT_LENGTH], source[:, -TEXT_LENGTH:]
        image_key = self.norm_k_img(self.k_img(images), self.num_heads)
        return *super().read(text), image_key, rearrange(self.v_img(images), "B S (N D) -> B S N D", N=self.num_heads)


class ImageEmbedding(nn.Module):
    """Project CLIP tokens to the model's width; tokens of a first and a last image have learned positions."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width = config.image_dim
        if config.image_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.image_positions, width))
        self.proj = nn.Sequential(
            LayerNorm(width),
            Linear(width, width),
            nn.GELU(),
            Linear(width, config.dim),
            LayerNorm(config.dim),
        )

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (B, I, d) in `dtype` of tokens (B, I, image_dim).

        Raises ValueError if the model has learned positions for a different number of tokens.
        """
        positions = getattr(self, "emb_pos", None)
        if positions is not None:
            if tokens.shape[1] != positions.shape[1]:
                raise ValueError(f"expected {positions.shape[1]} image tokens, got {tokens.shape[1]}")
            tokens = tokens.float() + positions.float()
        norm_in, first, gelu, second, norm_out = self.proj
        return norm_out(second(gelu(first(norm_in(tokens).to(dtype))))).to(dtype)


class GELU(nn.Module):
    """GELU with tanh approximation (Hendrycks and Gimpel 2016), in place if no gradient is needed."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return F.gelu(x, approximate="tanh")
        return torch.ops.aten.gelu_(x, approximate="tanh")
