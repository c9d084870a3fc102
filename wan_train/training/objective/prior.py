"""Prior preservation: on given captions, the trained model should predict what it did without its adapter.

The model with its adapter disabled is the teacher ("differential output preservation" in other trainers). This needs no
images of the class, but two more passes for each batch.
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
    """Embeddings (L, dim) of the captions, and the weight of their loss."""

    texts: Sequence[Tensor]
    weight: float

    def choose(self, keys: Sequence[SampleKey], *, seed: int, epoch: int) -> list[Tensor]:
        """Choose a caption for each sample of a batch, keyed by the sample."""
        chances = (random.Random(f"{seed} {epoch} {key.repeat} {key.item} prior") for key in keys)
        return [self.texts[chance.randrange(len(self.texts))] for chance in chances]


def prior_loss(
    model: nn.Module, bare: nn.Module, adapter: Adapter, latents: Tensor, conditions: Conditions, draws: Draws
) -> Tensor:
    """Return the mean squared difference of the velocity with and without the adapter, at the batch's noisy points.

    `model` is the trained model and `bare` the same without wrappers; all tensors are on the device.
    """
    noisy, timestep = conditions.fuse(interpolate(latents.float(), draws.noise, draws.t), draws.t * NUM_TIMESTEPS)
    with torch.no_grad(), adapter.disabled():
        taught = bare(noisy, timestep, **conditions.inputs())
    return F.mse_loss(model(noisy, timestep, **conditions.inputs()), taught)


def read_captions(path: str) -> list[str]:
    """Read the captions of a text file, one per line; empty lines and lines starting with # are ignored."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"--prior_captions {path} cannot be read: {problem}") from None
    captions = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not captions:
        raise InputError(f"--prior_captions {path} has no captions: write one per line")
    return captions
