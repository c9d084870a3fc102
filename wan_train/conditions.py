"""What the DiT reads beside the noisy latents; built here alone, for cache, preview and generator."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """The conditioning of a batch: `context`, a text embedding (L_i, text_dim) for each sample."""

    context: tuple[Tensor, ...]

    def to(self, device: torch.device) -> "Conditions":
        """The same on another device."""
        return Conditions(tuple(rows.to(device) for rows in self.context))

    def joined(self, other: "Conditions") -> "Conditions":
        """A batch of these and the other's samples."""
        return Conditions((*self.context, *other.context))

    def inputs(self) -> dict[str, list[Tensor]]:
        """Keyword arguments for the DiT."""
        return {"context": list(self.context)}
