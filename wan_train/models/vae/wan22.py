"""Layers of the Wan2.2 VAE, in stages with a shortcut, and the statistics of its 48 latent channels.

B batch, C channels, F frames of the chunk, H W height and width at the level. The shortcuts have no weights: in the
encoder they fold neighbouring positions into channels and average these in groups, in the decoder they repeat channels
and unfold them.
"""

import itertools

import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from wan_train.models.vae.geometry import Geometry
from wan_train.models.vae.layers import Downsample, FeatureCache, ResidualBlock, Upsample

# Statistics of the latents, per channel, published with the official Wan2.2 VAE.
LATENT_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
LATENT_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


class DownStage(nn.Module):
    """Residual blocks, then downsampling unless `temporal` is None, plus the averaged input.

    (B, C, F, H, W) -> (B, C', F or ceil(F/2), H/2, W/2), or (B, C', F, H, W) without downsampling. `temporal`: whether
    it halves the frames too.
    """

    def __init__(self, channels: int, out_channels: int, num_blocks: int, *, temporal: bool | None) -> None:
        super().__init__()
        self.factors = _factors(temporal=temporal)
        self.downsamples = _make_blocks(channels, out_channels, num_blocks)
        if temporal is not None:
            self.downsamples.append(Downsample(out_channels, temporal=temporal))

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, cache)
        y += average_neighbours(x, y.shape[1], self.factors)
        return y


class UpStage(nn.Module):
    """Residual blocks, then upsampling plus the repeated input; the blocks only if `temporal` is None.

    (B, C, F, H, W) -> (B, C', F or 2F, 2H, 2W), or (B, C', F, H, W) without upsampling. `temporal`: whether the frames
    after the clip's first one are doubled too.
    """

    def __init__(self, channels: int, out_channels: int, num_blocks: int, *, temporal: bool | None) -> None:
        super().__init__()
        self.factors = None if temporal is None else _factors(temporal=temporal)
        self.upsamples = _make_blocks(channels, out_channels, num_blocks)
        if temporal is not None:
            self.upsamples.append(Upsample(out_channels, out_channels, temporal=temporal))

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        y = x
        for layer in self.upsamples:
            y = layer(y, cache)
        return y if self.factors is None else add_repeated(y, x, self.factors, first=cache.starts(self))


def average_neighbours(x: Tensor, out_channels: int, factors: tuple[int, int]) -> Tensor:
    """Fold blocks of t x s x s positions into channels and average these in groups; `factors` are t and s.

    (B, C, F, H, W) -> (B, C', ceil(F/t), H/s, W/s). The first block is padded with zero frames before the clip's first
    frame.
    """
    t, s = factors
    if missing := -x.shape[2] % t:
        x = F.pad(x, (0, 0, 0, 0, missing, 0))
    folded = rearrange(x, "b c (f t) (h p) (w q) -> b f h w (c t p q)", t=t, p=s, q=s)
    return reduce(folded, "b f h w (c group) -> b f h w c", "mean", c=out_channels).movedim(-1, 1)


def add_repeated(y: Tensor, x: Tensor, factors: tuple[int, int], *, first: bool) -> Tensor:
    """Add `x` to `y` in place, with its channels repeated, then unfolded into blocks of t x s x s positions.

    y (B, C', F*t, H*s, W*s), x (B, C, F, H, W), `factors` t and s; C is a multiple of C'. For the `first` frame of a
    clip only the last of its t copies exists. The repeated tensor is never stored: each position of a block takes every
    C/C'-th channel of `x`.
    """
    t, s = factors
    ratio = x.shape[1] // y.shape[1]
    repeats = t * s * s // ratio
    skipped = t - 1 if first else 0
    for time, row, column in itertools.product(range(skipped, t), range(s), range(s)):
        channel = ((time * s + row) * s + column) // repeats
        y[:, :, time - skipped :: t - skipped, row::s, column::s] += x[:, channel::ratio]
    return y


def make_down_layers(geometry: Geometry) -> nn.ModuleList:
    """Return the layers from patch to latent resolution."""
    widths = (geometry.base, *geometry.widths)
    return nn.ModuleList(
        DownStage(channels, width, geometry.num_blocks, temporal=temporal)
        for (channels, width), temporal in zip(itertools.pairwise(widths), (*geometry.temporal, None), strict=True)
    )


def make_up_layers(geometry: Geometry) -> nn.ModuleList:
    """Return the layers from latent to patch resolution."""
    widths = (*geometry.decoder_widths, geometry.decoder_widths[-1])[::-1]
    steps = (*geometry.temporal[::-1], None)
    return nn.ModuleList(
        UpStage(channels, width, geometry.num_blocks + 1, temporal=temporal)
        for (channels, width), temporal in zip(itertools.pairwise(widths), steps, strict=True)
    )


def _make_blocks(channels: int, out_channels: int, count: int) -> nn.ModuleList:
    widths = [channels, *[out_channels] * count]
    return nn.ModuleList(ResidualBlock(narrow, wide) for narrow, wide in itertools.pairwise(widths))


def _factors(*, temporal: bool | None) -> tuple[int, int]:
    """Return the temporal and spatial factor of a resampling."""
    return 2 if temporal else 1, 1 if temporal is None else 2
