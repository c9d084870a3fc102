"""The kinds of Wan VAE, as rows of a table."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from wan_train.models.vae import wan21, wan22
from wan_train.models.vae.geometry import KIND21, KIND22, Geometry


@dataclass(frozen=True)
class VaeKind:
    """A kind of VAE: its published file, layers, patch size and latent statistics.

    `patch` is the side of the pixel patches that are folded into channels before the first layer.
    """

    name: str
    file: str
    patch: int
    make_down_layers: Callable[[Geometry], nn.ModuleList]
    make_up_layers: Callable[[Geometry], nn.ModuleList]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]

    @property
    def latent_channels(self) -> int:
        """Return the number of latent channels."""
        return len(self.latent_mean)


KINDS: dict[str, VaeKind] = {
    row.name: row
    for row in (
        VaeKind(
            name=KIND21,
            file="Wan2.1_VAE.pth",
            patch=1,
            make_down_layers=wan21.make_down_layers,
            make_up_layers=wan21.make_up_layers,
            latent_mean=wan21.LATENT_MEAN,
            latent_std=wan21.LATENT_STD,
        ),
        VaeKind(
            name=KIND22,
            file="Wan2.2_VAE.pth",
            patch=2,
            make_down_layers=wan22.make_down_layers,
            make_up_layers=wan22.make_up_layers,
            latent_mean=wan22.LATENT_MEAN,
            latent_std=wan22.LATENT_STD,
        ),
    )
}


def kind_of(latent_channels: int) -> VaeKind:
    """Return the kind with this number of latent channels."""
    return next(kind for kind in KINDS.values() if kind.latent_channels == latent_channels)
