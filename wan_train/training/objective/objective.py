"""The training objective of a run, with all its random draws."""

from dataclasses import dataclass

import torch

from dataset.batching.batches import Batch
from wan_train.conditions.conditions import Conditions
from wan_train.flow.timesteps import Span
from wan_train.models.variants import Variant
from wan_train.training.objective.conditioning import Rates, conditions_of, drop
from wan_train.training.objective.loss import Draws, draw
from wan_train.training.objective.prior import Prior
from wan_train.training.objective.strata import Strata
from wan_train.training.objective.target import Target
from wan_train.training.settings import LossSettings, TimestepSettings


@dataclass(frozen=True)
class Objective:
    """The loss of a run and its sources of randomness: every draw is keyed by `seed`, the epoch and the sample.

    `variant` says which conditions the model reads, and `rates` how often they are dropped. `strata` are given if and
    only if `timesteps` ask for them.
    """

    seed: int
    timesteps: TimestepSettings
    loss: LossSettings
    variant: Variant
    rates: Rates = Rates()  # noqa: RUF009
    strata: Strata | None = None
    prior: Prior | None = None

    def draw(self, batch: Batch, target: Target, epoch: int, limits: Span | None) -> Draws:
        """Draw noise and noise levels for a target, within `limits`, or the range of `timesteps` if None."""
        return draw(
            batch.keys,
            target.latents.shape[1:],
            self.timesteps,
            seed=self.seed,
            epoch=epoch,
            strata=self.strata,
            limits=limits,
        )

    def conditions(self, batch: Batch, epoch: int, device: torch.device) -> Conditions:
        """Return the conditions of a batch on a device, with some dropped, keyed by sample."""
        dropped = drop(batch.keys, self.rates, seed=self.seed, epoch=epoch)
        return conditions_of(batch, self.variant, device, dropped=dropped)
