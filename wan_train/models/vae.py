"""The Wan2.1 VAE: video to latents and back, as a stream of one frame and then four at a time.

B batch, C channels, F pixel frames, T latent frames, H W pixels, h w latent positions. T = 1 + (F - 1) / 4, h = H / 8,
w = W / 8. Pixels are in [-1, 1]; latents are normalised. Module and parameter names are those of the official file.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_train.cli import InputError
from wan_train.models.vae_geometry import Geometry, read_geometry
from wan_train.models.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    FeatureCache,
    ResidualBlock,
    RMSNorm,
    Upsample,
)
from wan_train.models.vae_names import vae_rename
from wan_train.models.vae_tiling import Tiling, blend_tiles
from wan_train.models.variants import LATENT_CHANNELS
from wan_train.models.weights import Shapes, check_names, fill, renamed, require_kind
from wan_train.storage import TensorSource, read_header, read_tensors

# Statistics of the latents, per channel, published with the official Wan2.1 VAE.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

Layers = Callable[[Tensor, FeatureCache], Tensor]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes


class Encoder(nn.Module):
    """A chunk of pixels (B, 3, F, H, W) -> mean and log variance (B, 2 * latent channels, T, h, w), not yet mixed."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(3, geometry.base)
        self.downsamples = nn.ModuleList()
        channels = geometry.base
        for level, width in enumerate(geometry.widths):
            if level:
                self.downsamples.append(Downsample(channels, temporal=geometry.temporal[level - 1]))
            for _ in range(geometry.num_blocks):
                self.downsamples.append(ResidualBlock(channels, width))
                channels = width
        self.middle = _make_middle(channels)
        self.head = _make_head(channels, 2 * geometry.latent_channels)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return self.finish(self.narrow(x, cache), cache)

    def narrow(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """The part that sees a neighbourhood only: pixels to features (B, C, T, h, w)."""
        x = self.conv1(x, cache)
        for layer in self.downsamples:
            x = layer(x, cache)
        return x

    def finish(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """The part that sees the whole picture, in one size."""
        for layer in self.middle:
            x = layer(x, cache)
        x = self.head["2"](F.silu(self.head["0"](x), inplace=True), cache)
        return x


class Decoder(nn.Module):
    """A chunk of mixed latents (B, latent channels, T, h, w) -> pixels (B, 3, F, H, W), not clamped."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        channels = geometry.widths[-1]
        self.conv1 = CausalConv3d(geometry.latent_channels, channels)
        self.middle = _make_middle(channels)
        self.upsamples = nn.ModuleList()
        for level, width in enumerate(reversed(geometry.widths)):
            if level:
                self.upsamples.append(Upsample(channels, channels // 2, temporal=geometry.temporal[-level]))
                channels //= 2
            for _ in range(geometry.num_blocks + 1):
                self.upsamples.append(ResidualBlock(channels, width))
                channels = width
        self.head = _make_head(channels, 3)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return self.widen(self.begin(x, cache), cache)

    def begin(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """The part that sees the whole picture, in one size: to features (B, C, T, h, w)."""
        x = self.conv1(x, cache)
        for layer in self.middle:
            x = layer(x, cache)
        return x

    def widen(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """The part that sees a neighbourhood only: features to pixels."""
        for layer in self.upsamples:
            x = layer(x, cache)
        x = self.head["2"](F.silu(self.head["0"](x), inplace=True), cache)
        return x


def _make_middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


def _make_head(channels: int, out_channels: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": RMSNorm(channels), "2": CausalConv3d(channels, out_channels)})


class WanVAE(nn.Module):
    """The Wan2.1 video VAE; make one with `load_vae`.

    Memory beyond input and output does not grow with the number of frames. `cache_on_cpu` (settable) keeps what the
    layers remember between chunks in main memory.

    With `tiling` (settable) the layers above the latents' own size work in tiles, and their memory does not grow with
    the picture either; the features between them and the layers that see the whole picture are then held for all
    frames.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.cache_on_cpu = False
        self.tiling: Tiling | None = None
        self.stride = 2 ** len(geometry.temporal)
        self.frame_stride = 2 ** sum(geometry.temporal)
        self.encoder = Encoder(geometry)
        self.decoder = Decoder(geometry)
        self.conv1 = CausalConv3d(2 * geometry.latent_channels, 2 * geometry.latent_channels, (1, 1, 1))
        self.conv2 = CausalConv3d(geometry.latent_channels, geometry.latent_channels, (1, 1, 1))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] -> normalised latents (B, 16, T, h, w), float32, on the pixels' device.

        The latents are the posterior's mean, not a sample. Without gradient. Raises ValueError unless F is 4n + 1 and
        H and W are multiples of 8.
        """
        self._check_pixels(pixels.shape)
        num_frames = 1 + (pixels.shape[2] - 1) // self.frame_stride

        def narrow(tile: Tensor) -> Tensor:
            return self._stream(self.encoder.narrow, tile, step=self.frame_stride, num_frames=num_frames)

        def finish(x: Tensor, cache: FeatureCache) -> Tensor:
            return self.conv1(self.encoder.finish(x, cache), cache).chunk(2, dim=1)[0]

        if self.tiling and self.tiling.divides(pixels.shape[-2] // self.stride, pixels.shape[-1] // self.stride):
            features = blend_tiles(narrow, pixels, self.tiling, cell=self.stride, out_cell=1)
            return normalise(self._stream(finish, features, step=1, num_frames=num_frames))
        whole = self._stream(
            lambda x, cache: finish(self.encoder.narrow(x, cache), cache),
            pixels,
            step=self.frame_stride,
            num_frames=num_frames,
        )
        return normalise(whole)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, 16, T, h, w) -> pixels (B, 3, F, H, W) in [-1, 1], float32, on the latents' device.

        Without gradient. Raises ValueError for another number of axes or channels.
        """
        if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS or 0 in latents.shape:
            raise ValueError(f"latents are (B, {LATENT_CHANNELS}, T, h, w), not {tuple(latents.shape)}")
        num_latents = latents.shape[2]
        num_frames = 1 + (num_latents - 1) * self.frame_stride

        def begin(x: Tensor, cache: FeatureCache) -> Tensor:
            return self.decoder.begin(self.conv2(x, cache), cache)

        def widen(tile: Tensor) -> Tensor:
            return self._stream(self.decoder.widen, tile, step=1, num_frames=num_frames).clamp_(-1, 1)

        x = denormalise(latents.float())
        if self.tiling and self.tiling.divides(*latents.shape[-2:]):
            features = self._stream(begin, x, step=1, num_frames=num_latents)
            return blend_tiles(widen, features, self.tiling, cell=1, out_cell=self.stride)
        whole = self._stream(
            lambda x, cache: self.decoder.widen(begin(x, cache), cache), x, step=1, num_frames=num_frames
        )
        return whole.clamp_(-1, 1)

    def _stream(self, layers: Layers, x: Tensor, *, step: int, num_frames: int) -> Tensor:
        """What the layers give for each chunk of `x`, float32, on its device."""
        cache = FeatureCache(on_cpu=self.cache_on_cpu)
        whole, done = torch.empty(0), 0
        for chunk in _chunks(x, step):
            part = layers(self._place(chunk), cache)
            if not done:
                whole = x.new_empty((*part.shape[:2], num_frames, *part.shape[3:]), dtype=torch.float32)
            whole[:, :, done : done + part.shape[2]] = part
            done += part.shape[2]
        return whole

    def _place(self, chunk: Tensor) -> Tensor:
        weight = self.conv2.weight
        return chunk.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last_3d)

    def _check_pixels(self, shape: Sequence[int]) -> None:
        if len(shape) != 5 or shape[1] != 3 or 0 in shape:
            raise ValueError(f"pixels are (B, 3, F, H, W), not {tuple(shape)}")
        _, _, f, h, w = shape
        if (f - 1) % self.frame_stride:
            raise ValueError(f"a clip has {self.frame_stride}n + 1 frames, not {f}")
        if h % self.stride or w % self.stride:
            raise ValueError(f"width and height are multiples of {self.stride}, not {w}x{h}")


def _chunks(x: Tensor, size: int) -> Iterator[Tensor]:
    """The first frame, then `size` frames at a time."""
    yield x[:, :, :1]
    yield from x[:, :, 1:].split(size, dim=2) if x.shape[2] > 1 else ()


def normalise(means: Tensor) -> Tensor:
    """The VAE's own latents (B, 16, ...) -> latents of about zero mean and unit variance."""
    mean, std = _statistics(means)
    return (means - mean) / std


def denormalise(latents: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    mean, std = _statistics(latents)
    return latents * std + mean


def _statistics(like: Tensor) -> Sequence[Tensor]:
    shape = (1, LATENT_CHANNELS, *[1] * (like.ndim - 2))
    return [
        torch.tensor(values, dtype=like.dtype, device=like.device).view(shape) for values in (LATENT_MEAN, LATENT_STD)
    ]


def load_vae(source: TensorSource, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> WanVAE:
    """Load a Wan2.1 VAE, frozen.

    `source`: a .pth or safetensors file, or a state dict, under official or diffusers names. The weights are `dtype`
    (None: as stored) and compute in it; on a CPU they are float32 in any case. Raises InputError when the file cannot
    be read, is something else, or has missing, unexpected or misshapen tensors.
    """
    what = "the VAE state dict" if isinstance(source, Mapping) else os.fspath(source)
    shapes = read_header(source).shapes
    model = _make_empty(shapes, what)
    on_cpu = torch.device(device).type == "cpu"
    tensors = renamed(read_tensors(source), vae_rename(shapes))
    fill(model, tensors, device=device, dtype=torch.float32 if on_cpu else dtype, what=what)
    for parameter in model.parameters():
        if parameter.ndim in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.ndim])
    return model.eval()


def check_vae(source: TensorSource, flag: str = "--vae") -> None:
    """Raise InputError, naming `flag` and the file, unless `load_vae` would take it; reads the header only."""
    what = flag if isinstance(source, Mapping) else f"{flag} {os.fspath(source)}"
    _make_empty(read_header(source).shapes, what)


def _make_empty(shapes: Shapes, what: str) -> WanVAE:
    """The model on `meta` that these tensors fill exactly, or an InputError."""
    require_kind(shapes, "VAE", what)
    rename = vae_rename(shapes)
    official = {rename(name): shape for name, shape in shapes.items()}
    geometry = read_geometry(official)
    if geometry.latent_channels != LATENT_CHANNELS:
        kind = "a Wan2.2 VAE" if geometry.latent_channels == 48 else "another VAE"
        raise InputError(
            f"{what} is {kind} with {geometry.latent_channels} latent channels, the model has {LATENT_CHANNELS}: "
            "give Wan2.1_VAE.pth"
        )
    with torch.device("meta"):
        model = WanVAE(geometry)
    check_names(official, model, what)
    return model
