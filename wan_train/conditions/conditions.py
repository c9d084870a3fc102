"""What the DiT reads beside the noisy latents: of one sample's images, and of a batch.

Legend: B batch, C channels of latents, F latent frames, H W latent size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wan_train.conditions.kinds import KINDS


@dataclass(frozen=True)
class ImageConditions:
    """What a model reads of the images that a video is made from: `extras` by name of `KINDS`, without a batch's axis.
    A model that reads the first frame fused has `first` (C, 1, H, W) alone, its latents."""

    extras: Mapping[str, Tensor] = field(default_factory=dict)
    first: Tensor | None = None


@dataclass(frozen=True)
class Conditions:
    """The conditioning of a batch: `context`, a text embedding (L_i, text_dim) for each sample, and `extras` by name of
    `KINDS`, each with the batch's axis in front unless it is shared.

    `first_frame` (B, C, 1, H, W) is what takes the place of the noisy first frame, in the samples for which `has_first`
    (B,) says so; see `fuse`.
    """

    context: tuple[Tensor, ...]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    first_frame: Tensor | None = None
    has_first: Tensor | None = None

    def to(self, device: torch.device) -> "Conditions":
        """The same on another device, but for what is shared."""
        extras = {name: value if KINDS[name].is_shared else value.to(device) for name, value in self.extras.items()}
        first, has_first = (None if value is None else value.to(device) for value in (self.first_frame, self.has_first))
        return Conditions(tuple(rows.to(device) for rows in self.context), extras, first, has_first)

    def joined(self, other: "Conditions") -> "Conditions":
        """A batch of these and the other's samples."""
        assert self.extras.keys() == other.extras.keys(), "samples of a batch have the same conditions"
        extras = {
            name: value if KINDS[name].is_shared else torch.cat([value, other.extras[name]])
            for name, value in self.extras.items()
        }
        first = _joined(self.first_frame, other.first_frame), _joined(self.has_first, other.has_first)
        return Conditions((*self.context, *other.context), extras, *first)

    def with_images(self, images: ImageConditions | None) -> "Conditions":
        """A single text with the images of its video."""
        if images is None:
            return self
        if images.first is not None:
            return replace(self, first_frame=images.first[None], has_first=torch.ones(1, dtype=torch.bool))
        extras = {name: value if KINDS[name].is_shared else value[None] for name, value in images.extras.items()}
        return replace(self, extras=extras)

    def with_context(self, context: Sequence[Tensor]) -> "Conditions":
        """Other texts beside the same images."""
        return replace(self, context=tuple(context))

    def inputs(self) -> dict[str, list[Tensor] | Tensor]:
        """Keyword arguments for the DiT."""
        return {"context": list(self.context), **self.extras}

    def fuse(self, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents (B, C, F, H, W) with the first frames that are given, and timesteps (B, F) with 0 for these;
        latents and timesteps (B,) as they are where none is given (official Wan2.2 TI2V)."""
        if self.first_frame is None:
            return noisy, timestep
        assert self.has_first is not None
        chosen = self.has_first.view(-1, 1, 1, 1, 1)
        begun = torch.where(chosen, self.first_frame.to(noisy), noisy[:, :, :1])
        each = timestep.unsqueeze(1).repeat(1, noisy.shape[2])
        each[:, 0] = torch.where(self.has_first, 0.0, each[:, 0])
        return torch.cat([begun, noisy[:, :, 1:]], dim=2), each


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    assert (one is None) == (other is None), "samples of a batch have images, or none has"
    return None if one is None or other is None else torch.cat([one, other])
