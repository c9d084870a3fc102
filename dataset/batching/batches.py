"""Cached clips as a torch Dataset, and how they are collated."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.batching.order import Pick, SampleKey, draw_flip, draw_variant
from dataset.caching.cache import latents_path, read_extra, read_latents, read_text
from dataset.caching.extras import FLIPPED, MASK, read_references, wanted_conditions
from dataset.caching.trusted import plan_from_caches
from dataset.config import DatasetConfig
from dataset.items import Clip
from dataset.reading.opening import check_caches
from dataset.sources import ClipPlan, list_items, plan_clips, warn_too_short
from wan_train.conditions.kinds import CAMERA, CONTROL_LATENTS, FRAME_POSITIONS, KINDS, MOTION
from wan_train.errors import InputError

_OF_ITEMS = (CONTROL_LATENTS, CAMERA, MOTION)  # beside references


@dataclass(frozen=True)
class Sample:
    """One cached clip: normalised latents (C, F, H, W) and text (L, dim), in the dtypes of their files.

    `weights` (F, H, W), float32 with mean 1, is the loss weight of each latent cell; None weights all cells equally.
    `loss_weight` and `is_reg` are the dataset's. `extras` are the model's other conditions, by name in `KINDS`.
    `has_vace_mask` is true if part of the VACE video may be kept, which the packed mask alone does not show for every
    frame.
    """

    key: SampleKey
    latents: Tensor
    context: Tensor
    weights: Tensor | None = None
    loss_weight: float = 1.0
    is_reg: bool = False
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    has_vace_mask: bool = False


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket: latents (B, C, F, H, W) and the text (L_i, dim) of each.

    `weights` (B, 1, F, H, W) is set if any sample has weights; those of the others are 1. The loss is multiplied by
    `loss_weight`; `is_reg` marks prior preservation samples. `extras` are those of the samples, stacked unless shared;
    `has_vace_mask` has one entry per sample, () if there are none.
    """

    keys: tuple[SampleKey, ...]
    latents: Tensor
    context: list[Tensor]
    weights: Tensor | None = None
    loss_weight: float = 1.0
    is_reg: bool = False
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    has_vace_mask: tuple[bool, ...] = ()

    def pin_memory(self) -> "Batch":
        """Return a copy in pinned memory; called by a DataLoader with `pin_memory`."""
        context = [text.pin_memory() for text in self.context]
        pinned: dict[str, Any] = {n: value.pin_memory() for n, value in vars(self).items() if isinstance(value, Tensor)}
        extras = {name: value.pin_memory() for name, value in self.extras.items()}
        return replace(self, context=context, extras=extras, **pinned)


class Bucket(NamedTuple):
    """The key by which samples can be stacked: dataset number, (width, height) and frames in pixels, and the conditions
    that differ between items."""

    dataset: int
    size: tuple[int, int]
    num_frames: int
    conditions: tuple[str, ...] = ()


def bucket_of(clip: Clip) -> Bucket:
    """Return the bucket of a clip's samples."""
    item = clip.item
    conditions = [kind.name for kind in wanted_conditions(item) if kind.name in _OF_ITEMS]
    conditions += [f"reference {number}" for number in range(1, len(read_references(item)) + 1)]
    return Bucket(item.config.number, clip.size, clip.num_frames, tuple(conditions))


class CachedDataset(Dataset[Sample]):
    """The cached clips of all datasets, each repeated `num_repeats` times; read on access.

    Index by position, by `SampleKey` or by `Pick`; only a `Pick` selects the caption and mirroring, the others use the
    first caption and no mirroring. `buckets` holds the positions of each bucket's samples, in order, and `configs` the
    settings of each dataset by number.
    """

    def __init__(self, plans: Sequence[ClipPlan]) -> None:
        self.plans = tuple(plans)
        self.configs = {plan.config.number: plan.config for plan in plans}
        self.keys: list[SampleKey] = []
        self.buckets: dict[Bucket, list[int]] = {}
        self._clips: list[Clip] = []
        folders = _short_names([plan.config.cache_directory.resolve() for plan in plans])
        for folder, plan in zip(folders, plans, strict=True):
            for clip, repeat in itertools.product(plan.clips, range(plan.config.num_repeats)):
                self.buckets.setdefault(bucket_of(clip), []).append(len(self.keys))
                self.keys.append(SampleKey(f"{folder}/{latents_path(clip).stem}", repeat))
                self._clips.append(clip)
        self._positions = {key: position for position, key in enumerate(self.keys)}
        assert len(self._positions) == len(self.keys), "two clips with the same name"

    @property
    def num_items(self) -> int:
        """Number of samples in an epoch, including repeats."""
        return len(self.keys)

    @property
    def clips(self) -> dict[str, Clip]:
        """The clip of each sample, by `SampleKey.item`."""
        return {key.item: clip for key, clip in zip(self.keys, self._clips, strict=True)}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int | SampleKey | Pick) -> Sample:
        position = self._positions[index] if isinstance(index, SampleKey) else index
        pick = position if isinstance(position, Pick) else Pick(position)
        clip = self._clips[pick.position]
        latents = read_extra(clip, FLIPPED) if pick.flipped else read_latents(clip)
        text = read_text(clip.item, pick.variant)
        weights, config = _read_weights(clip, flipped=pick.flipped), clip.item.config
        extras = _read_conditions(clip, flipped=pick.flipped)
        masked, key = clip.item.vace_mask is not None, self.key_of(pick)
        return Sample(key, latents, text, weights, config.loss_weight, config.is_reg, extras, masked)

    def key_of(self, pick: Pick) -> SampleKey:
        """Return the key of a picked sample; if it occurs again in the same epoch, the repeat number continues."""
        key, config = self.keys[pick.position], self._clips[pick.position].item.config
        return SampleKey(key.item, key.repeat + pick.turn * config.num_repeats)

    def pick(self, position: int, turn: int, *, seed: int, epoch: int) -> Pick:
        """Return a sample as an epoch uses it, with the caption and mirroring drawn for it."""
        item = self._clips[position].item
        key = self.key_of(Pick(position, turn=turn))
        variant = draw_variant(
            key,
            seed=seed,
            epoch=epoch,
            num_captions=len(item.captions),
            dropout_rate=item.config.caption_dropout_rate,
        )
        return Pick(position, variant, turn, item.config.flip_augment and draw_flip(key, seed=seed, epoch=epoch))


def open_cached(
    configs: Sequence[DatasetConfig], *, allow_missing_captions: bool, skip_broken: bool = False
) -> CachedDataset:
    """Return the samples that the TOML describes, all of them cached; no frame is decoded.

    Raises InputError, with the command to run, if a cache is missing, unreadable or outdated, and whatever `list_items`
    and `plan_clips` raise.
    """
    plans = [
        plan_clips(config, list_items(config, allow_missing_captions=allow_missing_captions), skip_broken=skip_broken)
        for config in configs
    ]
    warn_too_short(plans)
    options = f"--dataset_config {shlex.quote(str(configs[0].source))}"
    options += " --allow_missing_captions" * allow_missing_captions + " --skip_broken" * skip_broken
    check_caches(plans, options)
    return CachedDataset(plans)


def open_trusted(configs: Sequence[DatasetConfig]) -> CachedDataset:
    """Return the samples in the cache folders without reading the sources. Raises what `plan_from_caches` raises."""
    return CachedDataset([plan_from_caches(config) for config in configs])


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one bucket into a batch."""
    latents = torch.stack([sample.latents for sample in samples])
    context, weights = [sample.context for sample in samples], _stack_weights(samples)
    first = samples[0]
    extras = {
        name: value if KINDS[name].is_shared else torch.stack([sample.extras[name] for sample in samples])
        for name, value in first.extras.items()
    }
    return Batch(
        keys=tuple(sample.key for sample in samples),
        latents=latents,
        context=context,
        weights=weights,
        loss_weight=first.loss_weight,
        is_reg=first.is_reg,
        extras=extras,
        has_vace_mask=tuple(sample.has_vace_mask for sample in samples),
    )


def _stack_weights(samples: Sequence[Sample]) -> Tensor | None:
    if all(sample.weights is None for sample in samples):
        return None
    even = torch.ones(samples[0].latents.shape[1:])
    return torch.stack([even if sample.weights is None else sample.weights for sample in samples]).unsqueeze(1)


def _read_weights(clip: Clip, *, flipped: bool) -> Tensor | None:
    """Return a clip's loss mask, scaled to mean 1 so that masked and unmasked clips have the same total weight."""
    if clip.item.mask is None:
        return None
    mask = read_extra(clip, MASK).float()
    weights = mask / mask.mean()
    return weights.flip(-1) if flipped else weights


def _read_conditions(clip: Clip, *, flipped: bool) -> dict[str, Tensor]:
    """Return a clip's other conditions, by name in `KINDS`.

    Raises InputError if the cached temporal positions differ from those in the TOML.
    """
    extras = {}
    for kind in wanted_conditions(clip.item):
        value = read_extra(clip, kind.key_of(flipped=flipped))
        extras[kind.name] = value.flatten(0, -2) if kind.is_joined else value
    _check_positions(clip, extras.get(FRAME_POSITIONS))
    return extras


def _check_positions(clip: Clip, positions: Tensor | None) -> None:
    one_frame = clip.item.config.one_frame
    if positions is not None and one_frame is not None and tuple(positions.tolist()) != one_frame.positions:
        raise InputError(
            f"{latents_path(clip)} was cached for temporal positions {positions.tolist()}, {clip.item.config} sets"
            f" {list(one_frame.positions)}: cache it again"
        )


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the fewest trailing path components that make all paths distinct; the same on every machine."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names
