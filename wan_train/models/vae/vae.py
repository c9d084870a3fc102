"""The Wan VAEs: encode and decode video as a stream of one frame, then four at a time.

B batch, C channels, F pixel frames, T latent frames, H W pixels, h w latent positions. T = 1 + (F - 1) / 4; h = H / 8,
w = W / 8 and 16 latent channels in Wan2.1, h = H / 16, w = W / 16 and 48 channels in Wan2.2. Pixels are in [-1, 1];
latents are normalised. Modules and parameters have the names of the official files.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from wan_train.errors import InputError
from wan_train.models.vae.coders import Decoder, Encoder
from wan_train.models.vae.geometry import KIND21, KIND22, Geometry, read_geometry
from wan_train.models.vae.kinds import KINDS, kind_of
from wan_train.models.vae.layers import CausalConv3d, FeatureCache
from wan_train.models.vae.names import vae_rename
from wan_train.models.vae.strips import Strips
from wan_train.models.vae.tiling import Tiling, blend_tiles
from wan_train.models.variants import LATENT_CHANNELS
from wan_train.models.weights import Shapes, check_names, fill, renamed, require_kind
from wan_train.storage import TensorSource, read_header, read_tensors

Layers = Callable[[Tensor, FeatureCache], Tensor]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes


class WanVAE(nn.Module):
    """A Wan2.1 or Wan2.2 video VAE; create one with `load_vae`.

    A latent position corresponds to `stride` x `stride` pixels and, after the first, to `frame_stride` frames. Latents
    have `latent_channels` channels and are normalised with `latent_mean` and `latent_std` per channel.

    Memory beyond input and output does not grow with the number of frames. `cache_on_cpu` (settable) keeps the feature
    cache in CPU RAM between chunks.

    With `tiling` (settable) the layers above latent resolution work in tiles, so that their memory does not grow with
    the image size either; the features at latent resolution are then held for all frames. With `strips` (settable)
    several processes share these layers, each computing a strip of the frames: all must encode and decode the same
    input, and only the first one returns frames.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.cache_on_cpu = False
        self.tiling: Tiling | None = None
        self.strips: Strips | None = None
        kind = KINDS[geometry.kind]
        self.latent_channels = geometry.latent_channels
        self.latent_mean, self.latent_std = kind.latent_mean, kind.latent_std
        self.stride = kind.patch * 2 ** len(geometry.temporal)
        self.frame_stride = 2 ** sum(geometry.temporal)
        self.encoder = Encoder(geometry, kind.make_down_layers(geometry), patch=kind.patch)
        self.decoder = Decoder(geometry, kind.make_up_layers(geometry), patch=kind.patch)
        self.conv1 = CausalConv3d(2 * geometry.latent_channels, 2 * geometry.latent_channels, (1, 1, 1))
        self.conv2 = CausalConv3d(geometry.latent_channels, geometry.latent_channels, (1, 1, 1))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, F, H, W) in [-1, 1] into normalised latents (B, C, T, h, w), float32, on the same
        device.

        The latents are the posterior's mean, not a sample. Without gradient. Raises ValueError unless F is 4n + 1 and H
        and W are multiples of `stride`.
        """
        self._check_pixels(pixels.shape)
        num_frames = 1 + (pixels.shape[2] - 1) // self.frame_stride

        def narrow(tile: Tensor) -> Tensor:
            return self._stream(self.encoder.narrow, tile, step=self.frame_stride, num_frames=num_frames)

        def finish(x: Tensor, cache: FeatureCache) -> Tensor:
            return self.conv1(self.encoder.finish(x, cache), cache).chunk(2, dim=1)[0]

        if self.tiling and self.tiling.divides(pixels.shape[-2] // self.stride, pixels.shape[-1] // self.stride):
            features = blend_tiles(narrow, pixels, self.tiling, cell=self.stride, out_cell=1)
            return self._normalise(self._stream(finish, features, step=1, num_frames=num_frames))
        whole = self._stream(
            lambda x, cache: finish(self._narrow(x, cache), cache),
            pixels,
            step=self.frame_stride,
            num_frames=num_frames,
        )
        return self._normalise(whole)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, C, T, h, w) to pixels (B, 3, F, H, W) in [-1, 1], float32, on the same device.

        Without gradient. Raises ValueError for a different number of dimensions or channels.
        """
        chunks = self.decode_chunks(latents)
        return _join(chunks, 1 + (latents.shape[2] - 1) * self.frame_stride)

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode like `decode`, chunk by chunk: the first frame, then `frame_stride` frames at a time.

        Each chunk is (B, 3, f, H, W); with `strips` only the first process yields chunks. No earlier chunk is held,
        only the feature cache. With `tiling` the tiles are decoded one after another, each for all frames, so the
        pixels of all frames are held: the feature caches of all tiles would need more memory for up to a few hundred
        frames.
        """
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or 0 in latents.shape:
            raise ValueError(f"latents must be (B, {self.latent_channels}, T, h, w), not {tuple(latents.shape)}")
        return self._decode_chunks(latents)

    @torch.no_grad()
    def _decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        num_latents = latents.shape[2]
        num_frames = 1 + (num_latents - 1) * self.frame_stride

        def begin(x: Tensor, cache: FeatureCache) -> Tensor:
            return self.decoder.begin(self.conv2(x, cache), cache)

        def widen(tile: Tensor) -> Tensor:
            return self._stream(self.decoder.widen, tile, step=1, num_frames=num_frames).clamp_(-1, 1)

        x = denormalise(latents.float(), self.latent_mean, self.latent_std)
        if self.tiling and self.tiling.divides(*latents.shape[-2:]):
            features = self._stream(begin, x, step=1, num_frames=num_latents)
            whole = blend_tiles(widen, features, self.tiling, cell=1, out_cell=self.stride)
            yield from _chunks(whole, self.frame_stride)
        elif self.strips:
            yield from self._decode_strips(self.strips, begin, x)
        else:
            for part in self._parts(lambda x, cache: self.decoder.widen(begin(x, cache), cache), x, step=1):
                yield part.clamp(-1, 1)

    def _decode_strips(self, strips: Strips, begin: Layers, x: Tensor) -> Iterator[Tensor]:
        for part in self._parts(lambda x, cache: strips.widen(self.decoder, begin(x, cache), cache), x, step=1):
            whole = strips.join(part.clamp(-1, 1), x.shape[-2])
            if whole is not None:
                yield whole

    def _narrow(self, x: Tensor, cache: FeatureCache) -> Tensor:
        return self.strips.narrow(self.encoder, x, cache) if self.strips else self.encoder.narrow(x, cache)

    def _stream(self, layers: Layers, x: Tensor, *, step: int, num_frames: int) -> Tensor:
        """Run the layers on each chunk of `x` and join the results."""
        return _join(self._parts(layers, x, step=step), num_frames)

    def _parts(self, layers: Layers, x: Tensor, *, step: int) -> Iterator[Tensor]:
        """Yield the result of the layers for each chunk of `x`, float32, on its device."""
        cache = FeatureCache(on_cpu=self.cache_on_cpu)
        for chunk in _chunks(x, step):
            yield layers(self._place(chunk), cache).to(x.device, torch.float32)

    def _normalise(self, means: Tensor) -> Tensor:
        return normalise(means, self.latent_mean, self.latent_std)

    def _place(self, chunk: Tensor) -> Tensor:
        weight = self.conv2.weight
        return chunk.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last_3d)

    def _check_pixels(self, shape: Sequence[int]) -> None:
        if len(shape) != 5 or shape[1] != 3 or 0 in shape:
            raise ValueError(f"pixels must be (B, 3, F, H, W), not {tuple(shape)}")
        _, _, f, h, w = shape
        if (f - 1) % self.frame_stride:
            raise ValueError(f"a clip must have {self.frame_stride}n + 1 frames, not {f}")
        if h % self.stride or w % self.stride:
            raise ValueError(f"width and height must be multiples of {self.stride}, not {w}x{h}")


def _chunks(x: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the first frame, then `size` frames at a time."""
    yield x[:, :, :1]
    yield from x[:, :, 1:].split(size, dim=2) if x.shape[2] > 1 else ()


def _join(parts: Iterator[Tensor], num_frames: int) -> Tensor:
    """Concatenate parts (B, C, f, H, W) of `num_frames` frames without a second copy of the whole."""
    whole, done = torch.empty(0), 0
    for part in parts:
        if not done:
            whole = part.new_empty((*part.shape[:2], num_frames, *part.shape[3:]))
        whole[:, :, done : done + part.shape[2]] = part
        done += part.shape[2]
    return whole


def normalise(means: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise the VAE's own latents (B, C, ...) to about zero mean and unit variance.

    `mean` and `std`: the statistics of the C channels.
    """
    return (means - _per_channel(mean, means)) / _per_channel(std, means)


def denormalise(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo `normalise`."""
    return latents * _per_channel(std, latents) + _per_channel(mean, latents)


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, *[1] * (like.ndim - 2))


def load_vae(source: TensorSource, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> WanVAE:
    """Load a Wan2.1 or Wan2.2 VAE, frozen; the kind is inferred from the tensor names.

    `source`: a .pth or safetensors file, or a state dict, with official or diffusers names. Weights are stored in
    `dtype` (None: as in the file) and computed with in it; on a CPU they are always float32. Raises InputError if the
    file cannot be read, is not a VAE, or has missing, unexpected or misshapen tensors.
    """
    label = "the VAE state dict" if isinstance(source, Mapping) else os.fspath(source)
    shapes = read_header(source).shapes
    model = _make_empty(shapes, label)
    on_cpu = torch.device(device).type == "cpu"
    tensors = renamed(read_tensors(source), vae_rename(shapes))
    fill(model, tensors, device=device, dtype=torch.float32 if on_cpu else dtype, label=label)
    for parameter in model.parameters():
        if parameter.ndim in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.ndim])
    return model.eval()


def check_vae(source: TensorSource, flag: str = "--vae", *, latent_channels: int = LATENT_CHANNELS) -> None:
    """Raise InputError, naming `flag` and the file, unless `load_vae` accepts it; reads the header only.

    `latent_channels`: those of the model that the VAE is for; a VAE with a different number is refused.
    """
    label = flag if isinstance(source, Mapping) else f"{flag} {os.fspath(source)}"
    _make_empty(read_header(source).shapes, label, latent_channels=latent_channels)


def outline_vae(source: TensorSource, dtype: torch.dtype) -> WanVAE:
    """Return the VAE of a file without data: on the meta device, in `dtype`."""
    return _make_empty(read_header(source).shapes, "the VAE").to(dtype).eval()


def _make_empty(shapes: Shapes, label: str, *, latent_channels: int | None = None) -> WanVAE:
    """Return the VAE on the meta device whose weights match these tensors exactly. Raises InputError if there is none.

    `latent_channels`: the required number; None accepts any kind.
    """
    require_kind(shapes, "VAE", label)
    rename = vae_rename(shapes)
    official = {rename(name): shape for name, shape in shapes.items()}
    geometry = read_geometry(official)
    kind = KINDS[geometry.kind]
    wanted = kind if latent_channels is None else kind_of(latent_channels)
    if kind is not wanted or geometry.latent_channels != kind.latent_channels:
        other = ", or --task ti2v-5B" if kind.name == KIND22 and wanted.name == KIND21 else ""
        named = f"a {kind.name} VAE" if geometry.latent_channels == kind.latent_channels else "another VAE"
        raise InputError(
            f"{label} is {named} with {geometry.latent_channels} latent channels, but the model has "
            f"{wanted.latent_channels}: give {wanted.file}{other}"
        )
    with torch.device("meta"):
        model = WanVAE(geometry)
    check_names(official, model, label)
    return model
