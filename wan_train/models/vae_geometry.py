"""The sizes of a Wan2.1 VAE, and how to read them off a checkpoint's names and shapes."""

import itertools
from dataclasses import dataclass
from statistics import mode

from wan_train.models.variants import LATENT_CHANNELS
from wan_train.models.weights import Shapes


@dataclass(frozen=True)
class Geometry:
    """Sizes of a VAE; the defaults are the published ones.

    `base` channels after the first convolution, `widths` channels of each level from the pixels down, `num_blocks`
    residual blocks per level of the encoder (one more in the decoder), `temporal` whether each step down halves time.
    """

    base: int = 96
    widths: tuple[int, ...] = (96, 192, 384, 384)
    num_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    latent_channels: int = LATENT_CHANNELS


def read_geometry(shapes: Shapes) -> Geometry:
    """The geometry that official names and shapes describe; where they do not, the published one.

    Each size is the one that most tensors agree on, so that a single wrong tensor is later reported as just that.
    """
    widths: list[list[int]] = [[]]
    num_blocks = [0]
    temporal: list[bool] = []
    for index in itertools.count():
        layer = _below(shapes, f"encoder.downsamples.{index}.")
        if not layer:
            break
        if any(name.startswith("resample.") for name in layer):
            temporal.append(any(name.startswith("time_conv.") for name in layer))
            widths.append([])
            num_blocks.append(0)
        else:
            num_blocks[-1] += 1
            widths[-1] += _sizes(layer, "residual.2.bias", "residual.3.gamma", "residual.6.bias")
    ends = _sizes(shapes, "encoder.conv1.weight", "encoder.conv1.bias", "encoder.downsamples.0.residual.0.gamma")
    latents = _sizes(shapes, "conv2.weight", "conv2.bias")
    if not ends or not latents or not all(widths):
        return Geometry()
    return Geometry(mode(ends), tuple(map(mode, widths)), mode(num_blocks), tuple(temporal), mode(latents))


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _sizes(shapes: Shapes, *names: str) -> list[int]:
    """The first size of each of these tensors that is there."""
    return [shapes[name][0] for name in names if shapes.get(name)]
