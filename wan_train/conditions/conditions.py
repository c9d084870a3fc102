"""The conditions of the DiT: those of a sample's images, and those of a batch.

Legend: B batch, C channels of latents, F latent frames, H W latent size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wan_train.conditions.kinds import KINDS
from wan_train.placement.transfers import send


@dataclass(frozen=True)
class ImageConditions:
    """The conditions of a video's images: `extras` by name of `KINDS`, without the batch dimension.

    For a model that fuses the first frame into the latents, only `first` (C, 1, H, W), the latents of that frame.
    """

    extras: Mapping[str, Tensor] = field(default_factory=dict)
    first: Tensor | None = None


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch: `context`, a text embedding (L_i, text_dim) per sample, and `extras` by name of
    `KINDS`, with the batch dimension unless shared.

    `first_frame` (B, C, 1, H, W) replaces the noisy first frame of the samples where `has_first` (B,) is true; see
    `fuse`.
    """

    context: tuple[Tensor, ...]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    first_frame: Tensor | None = None
    has_first: Tensor | None = None

    def to(self, device: torch.device) -> "Conditions":
        """Return the conditions on a device, without waiting for copies; shared ones stay where they are."""
        extras = {name: value if KINDS[name].is_shared else send(value, device) for name, value in self.extras.items()}
        given = self.first_frame, self.has_first
        first, has_first = (None if value is None else send(value, device) for value in given)
        return Conditions(tuple(send(rows, device) for rows in self.context), extras, first, has_first)

    def joined(self, other: "Conditions") -> "Conditions":
        """Return the batch of these samples followed by the other's."""
        assert self.extras.keys() == other.extras.keys(), "samples of a batch have the same conditions"
        extras = {
            name: value if KINDS[name].is_shared else torch.cat([value, other.extras[name]])
            for name, value in self.extras.items()
        }
        first = _joined(self.first_frame, other.first_frame), _joined(self.has_first, other.has_first)
        return Conditions((*self.context, *other.context), extras, *first)

    def with_images(self, images: ImageConditions | None) -> "Conditions":
        """Return the conditions of a single text with those of its images."""
        if images is None:
            return self
        if images.first is not None:
            return replace(self, first_frame=images.first[None], has_first=torch.ones(1, dtype=torch.bool))
        extras = {name: value if KINDS[name].is_shared else value[None] for name, value in images.extras.items()}
        return replace(self, extras=extras)

    def with_context(self, context: Sequence[Tensor]) -> "Conditions":
        """Return the conditions with other texts."""
        return replace(self, context=tuple(context))

    def inputs(self) -> dict[str, list[Tensor] | Tensor]:
        """Return the keyword arguments for the DiT."""
        return {"context": list(self.context), **self.extras}

    def fuse(self, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noisy latents (B, C, F, H, W) with given first frames, and timesteps (B, F) with 0 for these.

        Without a first frame the latents and timesteps (B,) are unchanged (official Wan2.2 TI2V).
        """
        if self.first_frame is None:
            return noisy, timestep
        assert self.has_first is not None
        chosen = self.has_first.view(-1, 1, 1, 1, 1)
        begun = torch.where(chosen, self.first_frame.to(noisy), noisy[:, :, :1])
        each = timestep.unsqueeze(1).repeat(1, noisy.shape[2])
        each[:, 0] = torch.where(self.has_first, 0.0, each[:, 0])
        return torch.cat([begun, noisy[:, :, 1:]], dim=2), each


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    assert (one is None) == (other is None), "either all samples of a batch have images or none"
    return None if one is None or other is None else torch.cat([one, other])
