"""Prepare the conditions of a batch that the model reads besides its noisy latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataset.batching.batches import Batch
from dataset.batching.order import SampleKey, chance_of
from wan_train.conditions.conditions import Conditions
from wan_train.conditions.control import dit_arguments
from wan_train.conditions.kinds import CLIP_FEATURES, CONTROL_LATENTS, KINDS, REFERENCE, VACE_CONTEXT
from wan_train.conditions.vace import num_references
from wan_train.models.variants import Variant
from wan_train.training.settings import ImageSettings

I2V_RATIO = 0.5  # default for a combined text- and image-to-video model


@dataclass(frozen=True)
class Rates:
    """Probabilities, in [0, 1], of dropping a sample's images, control video and reference images."""

    images: float = 0.0
    control: float = 0.0
    reference: float = 0.0


@dataclass(frozen=True)
class Dropped:
    """Whether to drop each sample's images, control video and reference images; () drops none."""

    images: Sequence[bool] = ()
    control: Sequence[bool] = ()
    reference: Sequence[bool] = ()


NOTHING = Dropped()


def conditions_of(batch: Batch, variant: Variant, device: torch.device, *, dropped: Dropped = NOTHING) -> Conditions:
    """Return the texts and other conditions of a batch as arguments of the DiT, on a device, without waiting for
    copies.

    For samples whose images are dropped, the mask is empty and latents and tokens are zero, as in models that also work
    without an image (VideoX-Fun's InP). A dropped control video is zeros, or a VACE context without a video, and
    dropped references are zeros. A model with a fused first frame gets it in place of the noisy one, in clips of more
    than one frame.
    """
    if variant.is_fused:
        given = _kept(dropped.images or [False] * len(batch.context))
        first = batch.latents[:, :, :1].float()
        has_first = given & (batch.latents.shape[2] > 1)
        return Conditions(tuple(batch.context), first_frame=first, has_first=has_first).to(device)
    shape: Any = tuple(batch.latents.shape)
    arguments = dit_arguments(_without(batch, dropped), variant, shape, device=device)
    return Conditions(tuple(batch.context), arguments).to(device)


def dropping_rates(settings: ImageSettings, variant: Variant) -> Rates:
    """Return the probabilities of dropping conditions."""
    images = settings.image_dropout_rate
    if variant.is_fused:
        images = 1 - (I2V_RATIO if settings.i2v_ratio is None else settings.i2v_ratio)
    return Rates(images, settings.control_dropout_rate, settings.reference_dropout_rate)


def drop(keys: Sequence[SampleKey], rates: Rates, *, seed: int, epoch: int) -> Dropped:
    """Draw what is dropped for each sample, independently and keyed by the sample."""

    def drawn(decision: str, rate: float) -> list[bool]:
        return [chance_of(key, decision, seed=seed, epoch=epoch).random() < rate for key in keys]

    return Dropped(
        drawn("pictures", rates.images), drawn("control video", rates.control), drawn("references", rates.reference)
    )


def _without(batch: Batch, dropped: Dropped) -> dict[str, Tensor]:
    """Return the conditions of a batch with dropped ones zeroed. CLIP features belong to the reference image if there
    is one, otherwise to the first of the other images."""
    extras = dict(batch.extras)
    of_images = {name for name in extras if KINDS[name].is_dropped}
    if REFERENCE in extras:
        of_images -= {CLIP_FEATURES}
    of_reference = {REFERENCE, CLIP_FEATURES} if REFERENCE in extras else set()
    zeroed = ((dropped.images, of_images), (dropped.control, {CONTROL_LATENTS}), (dropped.reference, of_reference))
    for samples, names in zeroed:
        if any(samples):
            extras |= {name: _where(_kept(samples), extras[name]) for name in names & extras.keys()}
    if VACE_CONTEXT in extras:
        extras[VACE_CONTEXT] = _vace_without(batch, dropped)
    return extras


def _vace_without(batch: Batch, dropped: Dropped) -> Tensor:
    """Return the VACE context (B, 96, R+F, H, W) with zeros for dropped references. A dropped video is replaced
    completely: by the latents of a grey video if they are cached, otherwise by zeros.

    The latents of a grey video are the inactive latents of a video without a mask. With a mask they may contain a kept
    frame that the packed mask does not show, such as the first.
    """
    context, channels = batch.extras[VACE_CONTEXT], batch.latents.shape[1]
    if not any((*dropped.control, *dropped.reference)):
        return context  # in pinned memory, where a copy would not be
    num_before = num_references(context, batch.latents)
    before, video = context[:, :, :num_before], context[:, :, num_before:]
    if any(dropped.reference):
        before = _where(_kept(dropped.reference), before)
    if any(dropped.control):
        inactive, mask = video[:, :channels], video[:, 2 * channels :]
        grey = _where(_kept(batch.has_vace_mask or [False] * len(video)), inactive)
        without = torch.cat([grey, grey, torch.ones_like(mask)], dim=1)
        video = torch.where(_kept(dropped.control).to(video.device).view(-1, 1, 1, 1, 1), video, without)
    return torch.cat([before, video], dim=2)


def _kept(dropped: Sequence[bool]) -> Tensor:
    return torch.tensor([not each for each in dropped])


def _where(kept: Tensor, values: Tensor) -> Tensor:
    return values * kept.view(-1, *[1] * (values.ndim - 1)).to(values)
