"""Sizes of a Wan VAE, inferred from a checkpoint's names and shapes."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mode

from wan_train.models.variants import LATENT_CHANNELS
from wan_train.models.weights import Shapes

KIND21, KIND22 = "Wan2.1", "Wan2.2"


@dataclass(frozen=True)
class Geometry:
    """Sizes of a VAE; the defaults are those of the published Wan2.1 VAE.

    `base` is the number of channels after the first convolution, `widths` the channels per level from the pixels down,
    `num_blocks` the residual blocks per level of the encoder (the decoder has one more), `temporal` whether each
    downsampling also halves the frames, `decoder_widths` as `widths` (default: the same), and `kind` the name of the
    VAE's kind.
    """

    base: int = 96
    widths: tuple[int, ...] = (96, 192, 384, 384)
    num_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    latent_channels: int = LATENT_CHANNELS
    decoder_widths: tuple[int, ...] = ()
    kind: str = KIND21

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder_widths", self.decoder_widths or self.widths)


# The published VAEs, by kind.
GEOMETRIES: dict[str, Geometry] = {
    KIND21: Geometry(),
    KIND22: Geometry(
        base=160,
        widths=(160, 320, 640, 640),
        latent_channels=48,
        decoder_widths=(256, 512, 1024, 1024),
        kind=KIND22,
    ),
}


@dataclass(frozen=True)
class _Levels:
    """Sizes of the encoder or decoder per level: widths as in each tensor, number of residual blocks, and whether the
    resampling after it is temporal."""

    widths: Sequence[Sequence[int]]
    num_blocks: Sequence[int]
    temporal: Sequence[bool]


def read_geometry(shapes: Shapes) -> Geometry:
    """Infer the geometry from official names and shapes; where they are incomplete, use the published one.

    Each size is the most frequent one over tensors, so that a single wrong tensor is reported as such later.
    """
    staged = _below(shapes, "encoder.downsamples.0.downsamples.") or _below(shapes, "decoder.upsamples.0.upsamples.")
    kind = KIND22 if staged else KIND21
    down = _read_levels(_layers(shapes, "encoder.downsamples"))
    # The widths of a Wan2.1 decoder are those of its encoder.
    up = _read_levels(_layers(shapes, "decoder.upsamples")) if staged else _Levels(down.widths[::-1], (), ())
    ends = _sizes(
        shapes,
        "encoder.conv1.weight",
        "encoder.conv1.bias",
        "encoder.downsamples.0.residual.0.gamma",
        "encoder.downsamples.0.downsamples.0.residual.0.gamma",
    )
    latents = _sizes(shapes, "conv2.weight", "conv2.bias")
    if not ends or not latents or not all((*down.widths, *up.widths)) or len(down.widths) != len(up.widths):
        return GEOMETRIES[kind]
    return Geometry(
        base=mode(ends),
        widths=tuple(map(mode, down.widths)),
        num_blocks=mode(down.num_blocks),
        temporal=tuple(down.temporal),
        latent_channels=mode(latents),
        decoder_widths=tuple(map(mode, reversed(up.widths))),
        kind=kind,
    )


def _layers(shapes: Shapes, prefix: str) -> Iterator[Shapes]:
    """Yield the tensors of each layer of a list, in order, including those inside stages."""
    inner = prefix.rpartition(".")[2]
    for index in itertools.count():
        layer = _below(shapes, f"{prefix}.{index}.")
        if not layer:
            return
        if any(name.startswith(f"{inner}.") for name in layer):
            yield from _layers(layer, inner)
        else:
            yield layer


def _read_levels(layers: Iterator[Shapes]) -> _Levels:
    """Read the levels of the encoder or decoder; `layers` are residual blocks with a resampling between levels."""
    widths: list[list[int]] = [[]]
    num_blocks = [0]
    temporal: list[bool] = []
    for layer in layers:
        if any(name.startswith("resample.") for name in layer):
            temporal.append(any(name.startswith("time_conv.") for name in layer))
            widths.append([])
            num_blocks.append(0)
        else:
            num_blocks[-1] += 1
            widths[-1] += _sizes(layer, "residual.2.bias", "residual.3.gamma", "residual.6.bias")
    return _Levels(widths, num_blocks, temporal)


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _sizes(shapes: Shapes, *names: str) -> list[int]:
    """Return the first size of each of these tensors that exists."""
    return [shapes[name][0] for name in names if shapes.get(name)]
