"""Layers of the Wan video VAEs: causal in time, so that a clip can be processed chunk by chunk.

B batch, C channels, F frames of the chunk, H W height and width at the level. A stream starts with a chunk of one
frame; later chunks may have any length, and the result does not depend on the division. The layers have no state:
features of earlier chunks are in the `FeatureCache` that is passed through.

The layers preserve the memory layout of their input. Channels-last is the fast one: norms then reduce over contiguous
memory, and frames, rows and columns are merged without a copy.
"""

import itertools
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class FeatureCache:
    """The last input frames of each layer, for one stream through one encoder or decoder.

    `on_cpu` keeps them in CPU RAM between chunks to save GPU memory.
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        self._on_cpu = on_cpu
        self._frames: dict[nn.Module, Tensor] = {}
        self._started: set[nn.Module] = set()

    def starts(self, layer: nn.Module) -> bool:
        """Return whether this is the layer's first call in the stream."""
        first = layer not in self._started
        self._started.add(layer)
        return first

    def last(self, layer: nn.Module, device: torch.device) -> Tensor | None:
        """Return the frames (B, C, n, H, W) that the layer kept from the previous chunk."""
        frames = self._frames.get(layer)
        return None if frames is None else frames.to(device)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Keep a copy of `frames` for the layer's next chunk; a slice would keep the whole chunk alive."""
        self._frames[layer] = frames.to("cpu", copy=True) if self._on_cpu else frames.clone()


class CausalConv3d(nn.Conv3d):
    """Causal convolution (B, C, F, H, W) -> (B, C', F, H, W); zeros precede the first frame."""

    def __init__(self, channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.context = kernel[0] - 1

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:  # type: ignore[override]
        if self.kernel_size == (1, 1, 1):
            return mix_channels(x, self)
        num_frames = x.shape[2]
        past = cache.last(self, x.device)
        if past is not None:
            x = torch.cat([past, x], dim=2)
        cache.keep(self, x[:, :, -self.context :])
        missing = num_frames + self.context - x.shape[2]
        if num_frames > 1:
            return super().forward(F.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x)
        return self._make_frame(x, missing)

    def _make_frame(self, x: Tensor, missing: int) -> Tensor:
        """Compute a single output frame, without the `missing` taps that would multiply the zeros before the clip.

        It is a sum of 2D convolutions: torch's 3D convolution is slow for a single frame on a CPU.
        """
        taps = self.weight.unbind(2)[missing:]
        frames = x.unbind(2)
        y = F.conv2d(frames[0], taps[0], self.bias, padding=self.padding[1:])
        for frame, tap in zip(frames[1:], taps[1:], strict=True):
            y += F.conv2d(frame, tap, padding=self.padding[1:])
        return y.unsqueeze(2)


def mix_channels(x: Tensor, conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    """Apply a convolution with kernel size 1, (B, C, ...) -> (B, C', ...), as a Linear."""
    return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)


class RMSNorm(nn.Module):
    """Divide each channel vector by its root mean square and multiply by a gain; (B, C, ...) -> same shape.

    The gain is stored as (C, 1, 1) in attention and (C, 1, 1, 1) elsewhere, as in the published files.
    """

    def __init__(self, channels: int, num_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * num_axes))

    def forward(self, x: Tensor) -> Tensor:
        # The published layer clamps the vector's norm to at least 1e-12; eps is its square.
        return F.rms_norm(x.movedim(1, -1), (x.shape[1],), self.gamma.flatten(), eps=1e-24).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Norm, SiLU and causal convolution, twice, plus a shortcut; (B, C, F, H, W) -> (B, C', F, H, W).

    The keys are indices in the published layer list, whose other entries have no weights.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(channels),
                "2": CausalConv3d(channels, out_channels),
                "3": RMSNorm(out_channels),
                "6": CausalConv3d(out_channels, out_channels),
            }
        )
        self.shortcut = CausalConv3d(channels, out_channels, (1, 1, 1)) if channels != out_channels else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        y: Tensor = F.silu(self.residual["0"](x), inplace=True)
        y = self.residual["2"](y, cache)
        y = F.silu(self.residual["3"](y), inplace=True)
        y = self.residual["6"](y, cache)
        y += x if self.shortcut is None else self.shortcut(x, cache)
        return y


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of each frame; (B, C, F, H, W) -> same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, num_axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        b, _, f, h, w = x.shape
        qkv = mix_channels(self.norm(x), self.to_qkv)
        q, k, v = rearrange(qkv, "b (three c) f h w -> three (b f) 1 (h w) c", three=3)
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "(b f) 1 (h w) c -> b c f h w", b=b, f=f, h=h, w=w)
        return x + mix_channels(y, self.proj)


def make_middle(channels: int) -> nn.ModuleList:
    """Return the layers of a VAE's innermost level."""
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


def make_head(channels: int, out_channels: int) -> nn.ModuleDict:
    """Return the norm and convolution that end an encoder or decoder."""
    return nn.ModuleDict({"0": RMSNorm(channels), "2": CausalConv3d(channels, out_channels)})


def run_head(head: nn.ModuleDict, x: Tensor, cache: FeatureCache) -> Tensor:
    """Run the layers of `make_head`: (B, C, F, H, W) -> (B, C', F, H, W)."""
    out: Tensor = head["2"](F.silu(head["0"](x), inplace=True), cache)
    return out


class Downsample(nn.Module):
    """Halve height and width and, if `temporal`, the frames: (B, C, F, H, W) -> (B, C, F or ceil(F/2), H/2, W/2).

    The first frame of a clip stays single; the frames after it are merged in pairs.
    """

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        b = x.shape[0]
        frames = F.pad(rearrange(x, "b c f h w -> (b f) c h w"), (0, 1, 0, 1))
        x = rearrange(self.resample["1"](frames), "(b f) c h w -> b c f h w", b=b)
        if self.time_conv is None:
            return x
        past = cache.last(self, x.device)
        cache.keep(self, x[:, :, -1:])
        return x if past is None else self.time_conv(torch.cat([past, x], dim=2))


class Upsample(nn.Module):
    """Double height and width and, if `temporal`, the frames: (B, C, F, H, W) -> (B, C', F or 2F, 2H, 2W).

    The first frame of a clip stays single, and later frames do not see it.
    """

    def __init__(self, channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, out_channels, 3, padding=1)})
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        b = x.shape[0]
        if self.time_conv is not None and not cache.starts(self):
            # Channels are moved last before the halves are interleaved, which preserves the layout.
            x = rearrange(self.time_conv(x, cache), "b (k c) f h w -> b (f k) h w c", k=2).movedim(-1, 1)
        conv = cast(nn.Conv2d, self.resample["1"])
        frames = convolve_doubled(rearrange(x, "b c f h w -> (b f) c h w"), conv.weight, conv.bias)
        return rearrange(frames, "(b f) c h w -> b c f h w", b=b)


def convolve_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Upsample (B, C, H, W) by 2 (nearest), then apply a 3x3 convolution; -> (B, C', 2H, 2W).

    Two of three neighbours in the upsampled image are the same pixel, so each output pixel is a 2x2 convolution of the
    input with one of four kernels: 4/9 of the work, and the upsampled image is never stored.
    """
    b, _, h, w = x.shape
    kernels = _pair_taps(_pair_taps(weight.float(), 2), 3).to(weight.dtype)
    y = torch.empty(
        (b, weight.shape[0], 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    for row, column in itertools.product(range(2), repeat=2):
        kernel = kernels[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        y[:, :, row::2, column::2] = F.conv2d(x, kernel, bias, padding=1)[:, :, row : row + h, column : column + w]
    return y


def _pair_taps(weight: Tensor, axis: int) -> Tensor:
    """Combine three taps on an upsampled axis into two on the original axis, for even outputs, then for odd ones."""
    first, second, third = weight.unbind(axis)
    return torch.stack([first, second + third, first + second, third], dim=axis)
