"""Keeping what the model knows: on given captions the trained model shall predict what it did without its adapter.

The model itself, its adapter switched off, is the teacher (as in "differential output preservation" of other trainers):
no images of what is to be kept are needed, but two more passes of each batch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.batching.order import SampleKey
from networks.adapter import Adapter
from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError
from wan_train.flow.path import interpolate
from wan_train.flow.timesteps import NUM_TIMESTEPS
from wan_train.training.objective.loss import Draws


@dataclass(frozen=True)
class Prior:
    """The captions' embeddings (L, dim), and how much their loss counts."""

    texts: Sequence[Tensor]
    weight: float

    def choose(self, keys: Sequence[SampleKey], *, seed: int, epoch: int) -> list[Tensor]:
        """A caption for each sample of a batch, drawn by its key."""
        chances = (random.Random(f"{seed} {epoch} {key.repeat} {key.item} prior") for key in keys)
        return [self.texts[chance.randrange(len(self.texts))] for chance in chances]


def prior_loss(
    model: nn.Module, bare: nn.Module, adapter: Adapter, latents: Tensor, conditions: Conditions, draws: Draws
) -> Tensor:
    """Mean squared difference between the velocity with the adapter and without, at the batch's own noisy points.

    `model` is what is trained, `bare` the same without whatever wraps it; all tensors are on the device.
    """
    noisy, timestep = conditions.fuse(interpolate(latents.float(), draws.noise, draws.t), draws.t * NUM_TIMESTEPS)
    with torch.no_grad(), adapter.disabled():
        taught = bare(noisy, timestep, **conditions.inputs())
    return F.mse_loss(model(noisy, timestep, **conditions.inputs()), taught)


def read_captions(path: str) -> list[str]:
    """The captions of a text file, one to a line; empty lines and those that begin with # say nothing."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"--prior_captions {path} cannot be read: {problem}") from None
    captions = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not captions:
        raise InputError(f"--prior_captions {path} holds no caption: write one to a line")
    return captions
