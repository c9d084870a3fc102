"""The encoder and decoder of a Wan VAE: what Wan2.1 and Wan2.2 have in common.

B batch, C channels, F pixel frames, T latent frames, H W pixels, h w latent positions. The down and up layers and the
patch size, which differ between the VAEs, are passed in.
"""

from einops import rearrange
from torch import Tensor, nn

from wan_train.models.vae.geometry import Geometry
from wan_train.models.vae.layers import CausalConv3d, FeatureCache, make_head, make_middle, run_head


class Encoder(nn.Module):
    """Encode a chunk of pixels (B, 3, F, H, W) into mean and log variance (B, 2 * latent channels, T, h, w).

    The VAE's 1x1x1 convolution is not yet applied.
    """

    def __init__(self, geometry: Geometry, layers: nn.ModuleList, *, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.conv1 = CausalConv3d(3 * patch**2, geometry.base)
        self.downsamples = layers
        self.middle = make_middle(geometry.widths[-1])
        self.head = make_head(geometry.widths[-1], 2 * geometry.latent_channels)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return self.finish(self.narrow(x, cache), cache)

    def narrow(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """Run the layers with a local receptive field: pixels to features (B, C, T, h, w)."""
        x = self.conv1(fold_patches(x, self.patch), cache)
        for layer in self.downsamples:
            x = layer(x, cache)
        return x

    def finish(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """Run the layers that see the whole image, at latent resolution."""
        for layer in self.middle:
            x = layer(x, cache)
        return run_head(self.head, x, cache)


class Decoder(nn.Module):
    """Decode a chunk of latents (B, latent channels, T, h, w) to pixels (B, 3, F, H, W), not clamped.

    The VAE's 1x1x1 convolution has been applied to the latents.
    """

    def __init__(self, geometry: Geometry, layers: nn.ModuleList, *, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.conv1 = CausalConv3d(geometry.latent_channels, geometry.decoder_widths[-1])
        self.middle = make_middle(geometry.decoder_widths[-1])
        self.upsamples = layers
        self.head = make_head(geometry.decoder_widths[0], 3 * patch**2)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return self.widen(self.begin(x, cache), cache)

    def begin(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """Run the layers that see the whole image, at latent resolution; return features (B, C, T, h, w)."""
        x = self.conv1(x, cache)
        for layer in self.middle:
            x = layer(x, cache)
        return x

    def widen(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """Run the layers with a local receptive field: features to pixels."""
        for layer in self.upsamples:
            x = layer(x, cache)
        x = run_head(self.head, x, cache)
        return unfold_patches(x, self.patch)


def fold_patches(pixels: Tensor, patch: int) -> Tensor:
    """Fold patches of pixels into channels: (B, C, F, H, W) -> (B, C * patch^2, F, H/patch, W/patch).

    Within a patch the column varies slower than the row, as in the published Wan2.2 VAE. Memory is channels-last.
    """
    if patch == 1:
        return pixels
    return rearrange(pixels, "b c f (h q) (w r) -> b f h w (c r q)", q=patch, r=patch).movedim(-1, 1)


def unfold_patches(x: Tensor, patch: int) -> Tensor:
    """Unfold channels into patches; the inverse of `fold_patches`."""
    if patch == 1:
        return x
    return rearrange(x, "b (c r q) f h w -> b c f (h q) (w r)", q=patch, r=patch)
