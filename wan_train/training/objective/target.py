"""What the model learns to make of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.batching.batches import Batch
from wan_train.conditions.kinds import VACE_CONTEXT
from wan_train.conditions.vace import num_references, with_references


@dataclass(frozen=True)
class Target:
    """Latents (B, C, F, H, W) and how much each error counts, (B, 1, F, H, W) of mean 1, where not all count alike."""

    latents: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device) -> "Target":
        """The same on another device."""
        return Target(self.latents.to(device), None if self.weights is None else self.weights.to(device))


def target_of(batch: Batch) -> Target:
    """The latents of a batch, and in front of them those of VACE's reference images, which count as any frame."""
    context = batch.extras.get(VACE_CONTEXT)
    if context is None:
        return Target(batch.latents, batch.weights)
    weights, num_before = batch.weights, num_references(context, batch.latents)
    if weights is not None:
        shape = list(weights.shape)
        shape[2] = num_before
        weights = torch.cat([weights.new_ones(shape), weights], dim=2)
    return Target(with_references(batch.latents, context), weights)
