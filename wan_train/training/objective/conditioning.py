"""What the model is given of a batch beside its noisy latents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dataset.batching.batches import Batch
from dataset.batching.order import SampleKey, chance_of
from wan_train.conditions.conditions import Conditions
from wan_train.conditions.kinds import KINDS
from wan_train.models.variants import Variant
from wan_train.training.settings import PictureSettings

I2V_RATIO = 0.5  # of a model that is text and picture to video in one, where nobody says


def conditions_of(
    batch: Batch, device: torch.device, *, without_pictures: Sequence[bool] = (), fused: bool = False
) -> Conditions:
    """The texts of a batch and, where the model is given pictures, what it reads of them; all on a device.

    Samples that are `without_pictures` have a mask that gives nothing, and zeros for latents and tokens: what models
    that can do without a picture are given then (VideoX-Fun's InP). With `fused` the first frame of the others takes
    the place of the noisy one, in clips of more than one.
    """
    if fused:
        given = [not dropped for dropped in without_pictures] or [True] * len(batch.context)
        has_first = torch.tensor(given) & (batch.latents.shape[2] > 1)
        first = batch.latents[:, :, :1].float()
        return Conditions(tuple(batch.context), first_frame=first, has_first=has_first).to(device)
    extras = dict(batch.extras)
    if any(without_pictures):
        kept = torch.tensor([not dropped for dropped in without_pictures])
        extras |= {name: _where(kept, value) for name, value in extras.items() if KINDS[name].is_dropped}
    return Conditions(tuple(batch.context), extras).to(device)


def dropping_rate(settings: PictureSettings, variant: Variant) -> float:
    """The share of samples that go without their pictures."""
    if not variant.is_fused:
        return settings.image_dropout_rate
    return 1 - (I2V_RATIO if settings.i2v_ratio is None else settings.i2v_ratio)


def drop_pictures(keys: Sequence[SampleKey], rate: float, *, seed: int, epoch: int) -> list[bool]:
    """For each sample whether its pictures are dropped, drawn by its key."""
    return [chance_of(key, "pictures", seed=seed, epoch=epoch).random() < rate for key in keys]


def _where(kept: Tensor, values: Tensor) -> Tensor:
    return values * kept.view(-1, *[1] * (values.ndim - 1)).to(values)
