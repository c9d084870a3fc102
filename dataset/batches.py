"""Cached clips as a torch dataset, and the order in which an epoch takes them."""

import itertools
import json
import math
import random
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.buckets import describe_size
from dataset.cache import has_latents, has_text, latents_path, read_latents, read_text, text_path
from dataset.config import DatasetConfig
from dataset.items import Clip
from dataset.sources import Plan, list_items, name_some, plan_clips, warn_too_short
from wan_train.cli import InputError


@dataclass(frozen=True)
class SampleKey:
    """What a sample is called on every machine: folder and name of its cache file, and which of its repeats it is."""

    item: str
    repeat: int


@dataclass(frozen=True)
class Sample:
    """One cached clip: normalised latents (C, F, H, W) and text (L, dim), in the dtypes of their files."""

    key: SampleKey
    latents: Tensor
    context: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket: latents (B, C, F, H, W) and for each its text (L_i, dim)."""

    keys: tuple[SampleKey, ...]
    latents: Tensor
    context: list[Tensor]

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory; a DataLoader with `pin_memory` calls this."""
        return Batch(self.keys, self.latents.pin_memory(), [text.pin_memory() for text in self.context])


class Bucket(NamedTuple):
    """What samples share that can be stacked: the dataset's number, (width, height) and frames, in pixels."""

    dataset: int
    size: tuple[int, int]
    num_frames: int


class CachedDataset(Dataset[Sample]):
    """The cached clips of all datasets, each as often as its `num_repeats` says; read when asked for.

    Indexed by position or by `SampleKey`. `buckets` holds the positions of each bucket's samples, in order.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = tuple(plans)
        self.keys: list[SampleKey] = []
        self.buckets: dict[Bucket, list[int]] = {}
        self._clips: list[Clip] = []
        folders = _short_names([plan.config.cache_directory.resolve() for plan in plans])
        for folder, plan in zip(folders, plans, strict=True):
            for clip, repeat in itertools.product(plan.clips, range(plan.config.num_repeats)):
                bucket = Bucket(plan.config.number, clip.size, clip.num_frames)
                self.buckets.setdefault(bucket, []).append(len(self.keys))
                self.keys.append(SampleKey(f"{folder}/{latents_path(clip).stem}", repeat))
                self._clips.append(clip)
        self._positions = {key: position for position, key in enumerate(self.keys)}
        assert len(self._positions) == len(self.keys), "two clips of one name"

    @property
    def num_items(self) -> int:
        """Samples of an epoch, repeats counted."""
        return len(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int | SampleKey) -> Sample:
        position = self._positions[index] if isinstance(index, SampleKey) else index
        clip = self._clips[position]
        return Sample(self.keys[position], read_latents(clip), read_text(clip.item))


class EpochBatches:
    """Batches of positions in a `CachedDataset`, each of one bucket: the batch sampler of a DataLoader.

    The order of items and of batches depends on (seed, epoch) alone: not on the number of processes, not on the global
    generator. Process `rank` of `num_ranks` takes every num_ranks-th batch; where they do not divide, the first batches
    of the epoch are given out again, so that every process has as many. The last batch of a bucket may be smaller.
    """

    def __init__(self, dataset: CachedDataset, *, seed: int, rank: int = 0, num_ranks: int = 1) -> None:
        assert 0 <= rank < num_ranks
        batch_sizes = {plan.config.number: plan.config.batch_size for plan in dataset.plans}
        self._buckets = [
            (positions, batch_sizes[bucket.dataset]) for bucket, positions in sorted(dataset.buckets.items())
        ]
        self._seed, self._rank, self._num_ranks = seed, rank, num_ranks
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order that the next iteration takes."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches of one process in an epoch."""
        total = sum(math.ceil(len(positions) / size) for positions, size in self._buckets)
        return math.ceil(total / self._num_ranks)

    def __iter__(self) -> Iterator[list[int]]:
        # Text as a seed is hashed whole, so that neighbouring seeds and epochs have nothing in common.
        order = random.Random(f"{self._seed} {self._epoch}")
        batches: list[list[int]] = []
        for positions, size in self._buckets:
            shuffled = order.sample(positions, len(positions))
            batches += [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        order.shuffle(batches)
        padded = itertools.islice(itertools.cycle(batches), len(self) * self._num_ranks)
        return itertools.islice(padded, self._rank, None, self._num_ranks)


def open_cached(configs: Sequence[DatasetConfig], *, allow_missing_captions: bool) -> CachedDataset:
    """The samples that the TOML describes now, all of them cached; no frame is decoded.

    Raises InputError, with the command to run, where a cache is missing, unreadable, or was made for another size or
    caption; and whatever `list_items` and `plan_clips` raise.
    """
    plans = [
        plan_clips(config, list_items(config, allow_missing_captions=allow_missing_captions)) for config in configs
    ]
    warn_too_short(plans)
    clips = [clip for plan in plans for clip in plan.clips]
    items = list(dict.fromkeys(clip.item for clip in clips))
    no_latents = [latents_path(clip).name for clip in clips if not has_latents(clip)]
    no_text = [text_path(item).name for item in items if not has_text(item)]
    options = f"--dataset_config {shlex.quote(str(configs[0].source))}"
    options += " --allow_missing_captions" * allow_missing_captions
    problems = [
        f"{len(names)} of {total} {kind} caches are missing or not for what the TOML describes now"
        f" ({name_some(names)}): run `python {program} {options} {model} ...`"
        for names, total, kind, program, model in (
            (no_latents, len(clips), "latent", "wan_cache_latents.py", "--vae"),
            (no_text, len(items), "text", "wan_cache_text_encoder_outputs.py", "--t5"),
        )
        if names
    ]
    if problems:
        raise InputError("; ".join(problems))
    return CachedDataset(plans)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one bucket."""
    latents = torch.stack([sample.latents for sample in samples])
    return Batch(tuple(sample.key for sample in samples), latents, [sample.context for sample in samples])


def summarise(dataset: CachedDataset) -> str:
    """Lines for the log: files, clips and repeats of each dataset, samples and batches of each of its buckets."""
    lines = []
    for plan in dataset.plans:
        config, kind = plan.config, "videos" if plan.config.is_video else "images"
        lines.append(f"{config}: {len(plan.items)} {kind}, {len(plan.clips)} clips, num_repeats {config.num_repeats}")
        lines += [
            f"  {describe_size(bucket.size)}, {bucket.num_frames} frames: {len(positions)} samples"
            f" in {math.ceil(len(positions) / config.batch_size)} batches of {config.batch_size}"
            for bucket, positions in sorted(dataset.buckets.items())
            if bucket.dataset == config.number
        ]
    return "\n".join(lines)


def metadata(dataset: CachedDataset, configs: Sequence[DatasetConfig]) -> str:
    """JSON for a LoRA's `ss_datasets`: each dataset's settings and samples, and its folders without their path."""
    return json.dumps([_describe(config, dataset) for config in configs])


def _describe(config: DatasetConfig, dataset: CachedDataset) -> dict[str, Any]:
    shared = {
        "resolution": config.resolution,
        "caption_extension": config.caption_extension,
        "batch_size_per_device": config.batch_size,
        "num_repeats": config.num_repeats,
        "enable_bucket": config.enable_bucket,
        "bucket_no_upscale": config.bucket_no_upscale,
        "cache_directory": config.cache_directory.name,
        "num_train_items": sum(
            len(found) for bucket, found in dataset.buckets.items() if bucket.dataset == config.number
        ),
    }
    if not config.is_video:
        return {"image_directory": config.directory.name, **shared}
    return {
        "video_directory": config.directory.name,
        **shared,
        "target_frames": config.target_frames,
        "frame_extraction": config.frame_extraction,
        "frame_sample": config.frame_sample,
        "source_fps": config.source_fps,
    }


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The fewest last parts of each path that tell all of them apart, which are the same on every machine."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names
