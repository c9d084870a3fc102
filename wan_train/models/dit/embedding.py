"""Embed the inputs of a DiT.

Legend: B batch, C channels, F latent frames, H W latent size, L tokens, d token width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan_train.models.dit.layers import DitConfig
from wan_train.models.variants import TEXT_LENGTH
from wan_train.precision import float64_device


def embed_patches(conv: nn.Conv3d, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tokens (B, L, d) float32 of latents (B, C, F, H, W), computed in `dtype`.

    The stride of `conv` equals its kernel size, so this is a matrix product.
    """
    pt, ph, pw = conv.kernel_size
    patches = rearrange(latents, "B C (F t) (H h) (W w) -> B (F H W) (C t h w)", t=pt, h=ph, w=pw)
    weight, bias = conv.weight.flatten(1), conv.bias
    assert bias is not None
    return F.linear(patches.to(dtype), weight.to(dtype), bias.to(dtype)).float()


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Return the sinusoidal embedding (..., width) of t: cosines, then sines, of t * 10000^(-i / half), half = width/2.

    It is computed in float64.
    """
    half = width // 2
    device = float64_device(timestep.device)
    rates = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=device) / half)
    angles = timestep.to(device).to(torch.float64).unsqueeze(-1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(timestep.device)


def pad_context(context: list[Tensor] | Tensor, config: DitConfig, device: torch.device) -> Tensor:
    """Stack text embeddings of different lengths into (B, 512, text_dim), zero-padded at the end."""
    if isinstance(context, Tensor):
        return context.to(device)
    longest = max(len(rows) for rows in context)
    if longest > TEXT_LENGTH:
        raise ValueError(f"text embedding of {longest} tokens is longer than the maximum of {TEXT_LENGTH}")
    padded = torch.zeros(len(context), TEXT_LENGTH, config.text_dim, device=device, dtype=context[0].dtype)
    for row, text in zip(padded, context, strict=True):
        row[: len(text)] = text
    return padded
