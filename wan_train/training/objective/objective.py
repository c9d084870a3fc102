"""What a step learns of its batches, and all that is drawn for them."""

from dataclasses import dataclass

import torch

from dataset.batching.batches import Batch
from wan_train.conditions.conditions import Conditions
from wan_train.flow.timesteps import Span
from wan_train.training.objective.conditioning import conditions_of, drop_pictures
from wan_train.training.objective.loss import Draws, draw
from wan_train.training.objective.prior import Prior
from wan_train.training.objective.strata import Strata
from wan_train.training.settings import LossSettings, TimestepSettings


@dataclass(frozen=True)
class Objective:
    """The loss of a run and where its randomness comes from: every draw is keyed by `seed`, the epoch and the sample.

    `dropping_rate`, in [0, 1], is the share of samples that go without their images. `is_fused`: the first frame that a
    sample is given takes the place of the noisy one. `strata` are there exactly if `timesteps` ask for them.
    """

    seed: int
    timesteps: TimestepSettings
    loss: LossSettings
    dropping_rate: float = 0.0
    is_fused: bool = False
    strata: Strata | None = None
    prior: Prior | None = None

    def draw(self, batch: Batch, epoch: int, limits: Span | None) -> Draws:
        """Draw noise and noise levels for a batch, these within `limits` or, with None, those of `timesteps`."""
        return draw(
            batch.keys,
            batch.latents.shape[1:],
            self.timesteps,
            seed=self.seed,
            epoch=epoch,
            strata=self.strata,
            limits=limits,
        )

    def conditions(self, batch: Batch, epoch: int, device: torch.device) -> Conditions:
        """Return what the model reads beside the noisy latents of a batch, on a device; images are dropped by key."""
        dropped = drop_pictures(batch.keys, self.dropping_rate, seed=self.seed, epoch=epoch)
        return conditions_of(batch, device, without_pictures=dropped, fused=self.is_fused)
