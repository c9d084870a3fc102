"""The flow-matching loss: predict the velocity at a keyed point between data and noise."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.batching.order import SampleKey
from wan_train.cli import choose
from wan_train.conditions.conditions import Conditions
from wan_train.errors import InputError
from wan_train.flow.keyed import generator_of
from wan_train.flow.path import interpolate, velocity
from wan_train.flow.timesteps import NUM_TIMESTEPS, SAMPLERS, Distribution, Parameters, Span, level, shares_below
from wan_train.flow.weighting import WEIGHTINGS, importance
from wan_train.placement.transfers import pinned, send
from wan_train.training.settings import LossSettings, TimestepSettings

if TYPE_CHECKING:  # it reads data sets, whose packages the loss does not need
    from wan_train.training.objective.strata import Strata

LEAST_SHARE = 1e-6  # a smaller part of the distribution is a mistake, and too small to sample accurately
DEFAULT_LOSS = LossSettings()


@dataclass(frozen=True)
class Draws:
    """The random draws of a batch: `t` (B,) in [0, 1] and `noise` of the latents' shape, float32 on the CPU.

    `importance` (B,) is the weight of each sample's loss by the weighting scheme; None weights all equally.
    """

    t: Tensor
    noise: Tensor
    importance: Tensor | None = None

    def to(self, device: torch.device) -> "Draws":
        """Return a copy on another device, without waiting for it."""
        counts = None if self.importance is None else send(self.importance, device)
        return Draws(send(self.t, device), send(self.noise, device), counts)

    def pinned(self, device: torch.device) -> "Draws":
        """Return the draws in pinned CPU RAM, for copies to `device`."""
        counts = None if self.importance is None else pinned(self.importance, device)
        return Draws(pinned(self.t, device), pinned(self.noise, device), counts)


@dataclass(frozen=True)
class Losses:
    """The loss of a batch in float32: `mean` (), with gradient, and `samples` (B,), without."""

    mean: Tensor
    samples: Tensor


def distribution(settings: TimestepSettings, size: tuple[int, int]) -> Distribution:
    """Return the distribution of t for latents of this (height, width), before --min_timestep and --max_timestep."""
    make = choose("timestep sampling", settings.timestep_sampling, SAMPLERS)
    return make(
        Parameters(
            size=size,
            shift=settings.discrete_flow_shift,
            sigmoid_scale=settings.sigmoid_scale,
            density=settings.weighting_scheme,
            logit_mean=settings.logit_mean,
            logit_std=settings.logit_std,
            mode_scale=settings.mode_scale,
        )
    )


def span(settings: TimestepSettings) -> Span:
    """Return the range of t."""
    low, high = settings.min_timestep / NUM_TIMESTEPS, settings.max_timestep / NUM_TIMESTEPS
    return Span(low, high, settings.preserve_distribution_shape)


def check_timesteps(
    settings: TimestepSettings,
    sizes: Iterable[tuple[int, int]] = ((128, 128),),
    limits: Sequence[Span | None] = (None,),
) -> None:
    """Raise InputError for settings that contradict each other, or that leave almost no probability within one of the
    `limits` of experts for one of the latent sizes (height, width)."""
    low, high = settings.min_timestep, settings.max_timestep
    if low >= high:
        raise InputError(f"--min_timestep {low} must be below --max_timestep {high}")
    scheme, sampling = settings.weighting_scheme, settings.timestep_sampling
    if scheme not in ("none", *WEIGHTINGS) and sampling != "sigma":
        raise InputError(
            f"--weighting_scheme {scheme} sets the distribution of --timestep_sampling sigma and has no effect with "
            f"{sampling}: leave out one of them"
        )
    spans = [each or span(settings) for each in limits]
    for size, part in itertools.product(sizes, [each for each in spans if each.keep_shape]):
        below = shares_below(distribution(settings, size), part)
        if below[1] - below[0] < LEAST_SHARE:
            way = "leave out --preserve_distribution_shape" if limits == (None,) else "use another --timestep_sampling"
            raise InputError(
                f"--timestep_sampling {sampling} almost never samples from {NUM_TIMESTEPS * part.low:g} to"
                f" {NUM_TIMESTEPS * part.high:g}: widen --min_timestep and --max_timestep, or {way}"
            )


def draw_levels(
    uniform: Sequence[float], size: tuple[int, int], settings: TimestepSettings, limits: Span | None = None
) -> Tensor:
    """Map uniform numbers in [0, 1) to t (B,), float32, distributed as the settings say; `size` is the latents'
    (height, width). `limits` override the range of the settings."""
    made, limits = distribution(settings, size), limits or span(settings)
    return torch.tensor([level(number, made, limits) for number in uniform], dtype=torch.float32)


def draw(
    keys: Sequence[SampleKey],
    shape: Sequence[int],
    settings: TimestepSettings,
    *,
    seed: int,
    epoch: int,
    strata: "Strata | None" = None,
    limits: Span | None = None,
) -> Draws:
    """Draw t and noise for each sample of a batch; `shape` is that of one sample's latents, `limits` override the range
    of the settings.

    `strata` are given if and only if --num_timestep_buckets is.
    """
    assert (strata is None) == (settings.num_timestep_buckets is None)
    uniforms, noises = [], []
    for key in keys:
        generator = generator_of(f"{seed}/{epoch}/{key.repeat}/{key.item}")
        uniforms.append(float(torch.rand((), generator=generator)))
        noises.append(torch.randn(*shape, generator=generator))
    if strata is not None:
        places = strata.strata_of(keys, epoch)
        uniforms = [(place + u) / strata.num_strata for place, u in zip(places, uniforms, strict=True)]
    t = draw_levels(uniforms, (shape[-2], shape[-1]), settings, limits)
    return Draws(t, torch.stack(noises), importance(settings.weighting_scheme, t))


def _squared(predicted: Tensor, target: Tensor, settings: LossSettings, reduction: str) -> Tensor:
    return F.mse_loss(predicted, target, reduction=reduction)


def _huber(predicted: Tensor, target: Tensor, settings: LossSettings, reduction: str) -> Tensor:
    """Return the Huber loss: squared up to `huber_c` and linear beyond (Huber 1964)."""
    return F.huber_loss(predicted, target, reduction=reduction, delta=settings.huber_c)


ERRORS: dict[str, Callable[[Tensor, Tensor, LossSettings, str], Tensor]] = {"mse": _squared, "huber": _huber}


def measure(
    model: nn.Module,
    latents: Tensor,
    conditions: Conditions,
    draws: Draws,
    *,
    weights: Tensor | None = None,
    settings: LossSettings = DEFAULT_LOSS,
) -> Losses:
    """Run the model once and return the loss of its predicted velocity, in float32; all tensors are on its device.

    `weights` broadcast to the latents' shape and weight each element's error; their mean is 1.
    """
    data = latents.float()
    target = velocity(data, draws.noise)
    noisy, timestep = conditions.fuse(interpolate(data, draws.noise, draws.t), draws.t * NUM_TIMESTEPS)
    predicted = model(noisy, timestep, **conditions.inputs()).float()
    error = choose("loss", settings.loss_type, ERRORS)
    counts = _without_given(_counts(draws, weights, data.ndim), conditions, data)
    if counts is None:
        with torch.no_grad():
            samples = error(predicted, target, settings, "none").flatten(1).mean(1)
        return Losses(error(predicted, target, settings, "mean"), samples)
    errors = error(predicted, target, settings, "none") * counts
    return Losses(errors.mean(), errors.detach().flatten(1).mean(1))


def _without_given(counts: Tensor | None, conditions: Conditions, data: Tensor) -> Tensor | None:
    """Return the weights with given first frames masked out and the remaining frames scaled to keep the mean."""
    if conditions.has_first is None:
        return counts
    frames = data.shape[2]
    kept = torch.ones(len(data), 1, frames, 1, 1, device=data.device)
    kept[:, 0, 0, 0, 0] = torch.where(conditions.has_first, 0.0, 1.0)
    kept = kept * (frames / kept.sum(2, keepdim=True))
    return kept if counts is None else counts * kept


def _counts(draws: Draws, weights: Tensor | None, ndim: int) -> Tensor | None:
    """Return the weight of each element's error; None weights all equally."""
    if draws.importance is None:
        return weights
    counts = draws.importance.view(-1, *[1] * (ndim - 1))
    return counts if weights is None else counts * weights
