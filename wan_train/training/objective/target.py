"""The training target of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.batching.batches import Batch
from wan_train.conditions.kinds import VACE_CONTEXT
from wan_train.conditions.vace import num_references, with_references
from wan_train.placement.transfers import pinned, send


@dataclass(frozen=True)
class Target:
    """Latents (B, C, F, H, W) and the weight of each error, (B, 1, F, H, W) with mean 1; None weights all equally."""

    latents: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device) -> "Target":
        """Return a copy on another device, without waiting for it."""
        return Target(send(self.latents, device), None if self.weights is None else send(self.weights, device))

    def pinned(self, device: torch.device) -> "Target":
        """Return the target in pinned CPU RAM, for copies to `device`."""
        return Target(pinned(self.latents, device), None if self.weights is None else pinned(self.weights, device))


def target_of(batch: Batch) -> Target:
    """Return the latents of a batch, preceded by those of VACE's reference images, which are weighted like any
    frame."""
    context = batch.extras.get(VACE_CONTEXT)
    if context is None:
        return Target(batch.latents, batch.weights)
    weights, num_before = batch.weights, num_references(context, batch.latents)
    if weights is not None:
        shape = list(weights.shape)
        shape[2] = num_before
        weights = torch.cat([weights.new_ones(shape), weights], dim=2)
    return Target(with_references(batch.latents, context), weights)
