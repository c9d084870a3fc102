"""What is learnt: the velocity at a keyed point between data and noise."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.order import SampleKey
from wan_train.cli import choose
from wan_train.conditions import Conditions
from wan_train.flow.path import interpolate, velocity
from wan_train.flow.timesteps import NUM_TIMESTEPS, SAMPLERS
from wan_train.training.settings import TimestepSettings


@dataclass(frozen=True)
class Draws:
    """The randomness of a batch: `t` (B,) in [0, 1] and `noise` of the latents' shape, float32 on the CPU."""

    t: Tensor
    noise: Tensor


def keyed_generator(seed: int, epoch: int, key: SampleKey) -> torch.Generator:
    """A generator that depends on the run's seed, the epoch and the sample alone: not on rank, worker or batch."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key.repeat}/{key.item}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def draw(
    keys: Sequence[SampleKey], shape: Sequence[int], settings: TimestepSettings, *, seed: int, epoch: int
) -> Draws:
    """Noise level and noise of every sample of a batch; `shape` is that of one sample's latents."""
    sample = choose("timestep sampling", settings.timestep_sampling, SAMPLERS)
    levels, noises = [], []
    for key in keys:
        generator = keyed_generator(seed, epoch, key)
        levels.append(
            sample(generator, shift_factor=settings.discrete_flow_shift, sigmoid_scale=settings.sigmoid_scale)
        )
        noises.append(torch.randn(*shape, generator=generator))
    return Draws(torch.stack(levels), torch.stack(noises))


def flow_loss(
    model: nn.Module, latents: Tensor, conditions: Conditions, draws: Draws, *, weights: Tensor | None = None
) -> Tensor:
    """Mean squared error of the predicted velocity, in float32; all tensors on the model's device.

    `weights`, of a shape that broadcasts to the latents', say how much each error counts; their mean is 1.
    """
    data = latents.float()
    noisy = interpolate(data, draws.noise, draws.t)
    predicted = model(noisy, draws.t * NUM_TIMESTEPS, **conditions.inputs())
    if weights is None:
        return F.mse_loss(predicted.float(), velocity(data, draws.noise))
    return ((predicted.float() - velocity(data, draws.noise)).square() * weights).mean()
