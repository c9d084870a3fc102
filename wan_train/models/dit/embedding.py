"""From the inputs of a DiT to what its blocks work on.

Legend: B batch, C channels, F latent frames, H W latent size, L tokens, d width of a token.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan_train.models.dit.layers import DitConfig
from wan_train.models.variants import TEXT_LENGTH
from wan_train.precision import float64_device


def embed_patches(conv: nn.Conv3d, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tokens (B, L, d) float32 of latents (B, C, F, H, W), products taken in `dtype`.

    The stride of `conv` is its kernel, so it is a matrix product.
    """
    pt, ph, pw = conv.kernel_size
    patches = rearrange(latents, "B C (F t) (H h) (W w) -> B (F H W) (C t h w)", t=pt, h=ph, w=pw)
    weight, bias = conv.weight.flatten(1), conv.bias
    assert bias is not None
    return F.linear(patches.to(dtype), weight.to(dtype), bias.to(dtype)).float()


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t * 10000^(-i / half), i below half = width/2: (..., width), taken in float64."""
    half = width // 2
    device = float64_device(timestep.device)
    rates = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=device) / half)
    angles = timestep.to(device).to(torch.float64).unsqueeze(-1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(timestep.device)


def pad_context(context: list[Tensor] | Tensor, config: DitConfig, device: torch.device) -> Tensor:
    """Embeddings of texts of different length as one (B, 512, text_dim), zeros behind each text."""
    if isinstance(context, Tensor):
        return context.to(device)
    longest = max(len(rows) for rows in context)
    if longest > TEXT_LENGTH:
        raise ValueError(f"a text embedding has {longest} rows, the model takes at most {TEXT_LENGTH}")
    padded = torch.zeros(len(context), TEXT_LENGTH, config.text_dim, device=device, dtype=context[0].dtype)
    for row, text in zip(padded, context, strict=True):
        row[: len(text)] = text
    return padded
