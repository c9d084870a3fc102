"""The sizes of a Wan VAE, and how to read them off a checkpoint's names and shapes."""

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

    `base` channels after the first convolution, `widths` channels of each level from the pixels down, `num_blocks`
    residual blocks per level of the encoder (one more in the decoder), `temporal` whether each step down halves time,
    `decoder_widths` as `widths` (and the same where nothing is given), `kind` the name of the VAE's kind.
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
    """What the layers of one side say, level by level in their order: widths as each tensor has them, the number of
    residual blocks, and whether the step after it changes time."""

    widths: Sequence[Sequence[int]]
    num_blocks: Sequence[int]
    temporal: Sequence[bool]


def read_geometry(shapes: Shapes) -> Geometry:
    """The geometry that official names and shapes describe; where they do not, the published one.

    Each size is the one that most tensors agree on, so that a single wrong tensor is later reported as just that.
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
    """The tensors of each layer of a list, in order, through the stages where the list has any."""
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
    """`layers`: those of one side, residual blocks and, between two levels, a resampling."""
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
    """The first size of each of these tensors that is there."""
    return [shapes[name][0] for name in names if shapes.get(name)]
