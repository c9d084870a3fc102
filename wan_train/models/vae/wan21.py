"""Layers of the Wan2.1 VAE, in one flat list, and the statistics of its 16 latent channels."""

from torch import nn

from wan_train.models.vae.geometry import Geometry
from wan_train.models.vae.layers import Downsample, ResidualBlock, Upsample

# Statistics of the latents, per channel, published with the official Wan2.1 VAE.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


def make_down_layers(geometry: Geometry) -> nn.ModuleList:
    """Return the layers from pixel to latent resolution."""
    layers = nn.ModuleList()
    channels = geometry.base
    for level, width in enumerate(geometry.widths):
        if level:
            layers.append(Downsample(channels, temporal=geometry.temporal[level - 1]))
        for _ in range(geometry.num_blocks):
            layers.append(ResidualBlock(channels, width))
            channels = width
    return layers


def make_up_layers(geometry: Geometry) -> nn.ModuleList:
    """Return the layers from latent to pixel resolution; each upsampling halves the channels."""
    layers = nn.ModuleList()
    channels = geometry.decoder_widths[-1]
    for level, width in enumerate(reversed(geometry.decoder_widths)):
        if level:
            layers.append(Upsample(channels, channels // 2, temporal=geometry.temporal[-level]))
            channels //= 2
        for _ in range(geometry.num_blocks + 1):
            layers.append(ResidualBlock(channels, width))
            channels = width
    return layers
