"""Where on the path a training sample lies: `--timestep_sampling`, and the shift that resolution calls for."""

from collections.abc import Callable

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000  # the DiT reads t as a number in 0..1000


def shift(t: Tensor, factor: float) -> Tensor:
    """Move t in [0, 1] towards noise: s t / (1 + (s-1) t) (Esser et al. 2024, eq. 23). Factor 1 changes nothing."""
    return factor * t / (1 + (factor - 1) * t)


def draw_uniform(generator: torch.Generator, *, shift_factor: float, sigmoid_scale: float) -> Tensor:
    """t ~ U(0, 1)."""
    return torch.rand((), generator=generator)


def draw_sigmoid(generator: torch.Generator, *, shift_factor: float, sigmoid_scale: float) -> Tensor:
    """t = sigmoid(scale * n), n ~ N(0, 1): the logit-normal of Esser et al. 2024, section 3.1."""
    return torch.sigmoid(sigmoid_scale * torch.randn((), generator=generator))


def draw_shift(generator: torch.Generator, *, shift_factor: float, sigmoid_scale: float) -> Tensor:
    """A logit-normal t, shifted towards noise."""
    t = draw_sigmoid(generator, shift_factor=shift_factor, sigmoid_scale=sigmoid_scale)
    return shift(t, shift_factor)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "uniform": draw_uniform,
    "sigmoid": draw_sigmoid,
    "shift": draw_shift,
}
