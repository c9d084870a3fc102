"""Encode every clip that a dataset file describes and keep its latents beside it, or in its cache folder."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import wan_train
from cache_tools.runner import summarise_run, work_ahead
from cache_tools.settings import CacheLatentsSettings
from dataset.buckets import describe_size
from dataset.cache import has_latents, save_latents
from dataset.config import read_config
from dataset.items import Clip, Item
from dataset.media import load_clips
from dataset.sources import list_items, plan_clips, warn_too_short
from wan_train.cli import InputError
from wan_train.log import get_logger
from wan_train.models.vae import check_vae
from wan_train.precision import default_device, dtype_of
from wan_train.storage import check_writable

logger = get_logger(__name__)


@dataclass(frozen=True)
class LoadedClip:
    """A clip with its pictures (F, H, W, 3) in uint8."""

    clip: Clip
    pictures: NDArray[np.uint8]


def main(settings: CacheLatentsSettings) -> None:
    """Check everything, then encode what is not there yet; a run that finds nothing to do loads no model."""
    configs = read_config(settings.dataset.dataset_config)
    if not settings.vae.vae:
        raise InputError("--vae is missing: name the VAE's file, such as Wan2.1_VAE.pth")
    check_vae(settings.vae.vae)
    device = default_device(settings.run.device)
    for config in configs:
        check_writable(config.cache_directory)
    allowed = settings.dataset.allow_missing_captions
    plans = [plan_clips(config, list_items(config, allow_missing_captions=allowed)) for config in configs]
    dtype = dtype_of(settings.vae.vae_dtype)
    due = [[clip for clip in plan.clips if not has_latents(clip, dtype)] for plan in plans]
    num_due = sum(map(len, due))
    if num_due:
        vae = wan_train.load_vae(settings.vae.vae, device=device, dtype=dtype)
        vae.cache_on_cpu = settings.vae.vae_cache_cpu
        with tqdm(desc="latents", total=num_due, unit="clip") as bar:
            for plan, clips in zip(plans, due, strict=True):
                logger.info("%s: %s", plan.config, _describe(clips, num_all=len(plan.clips)))
                batch_size = min(plan.config.batch_size, settings.run.batch_size or plan.config.batch_size)
                loaded = _load(clips, settings.run.num_workers)
                for batch in batch_clips(loaded, batch_size):
                    _encode_batch(vae, batch, device, dtype)
                    bar.update(len(batch))
    num_kept = sum(len(plan.clips) for plan in plans) - num_due
    num_too_short = sum(len(plan.too_short) for plan in plans)
    warn_too_short(plans)
    logger.info(summarise_run("latents", num_encoded=num_due, num_kept=num_kept, num_too_short=num_too_short))


def batch_clips(loaded: Iterable[LoadedClip], batch_size: int) -> Iterator[list[LoadedClip]]:
    """Gather clips of one size and length, at most `batch_size` together.

    Where clips come sorted by size, no more than one unfinished batch for each length is held.
    """
    pending: dict[int, list[LoadedClip]] = {}
    size = None
    for one in loaded:
        if one.clip.size != size:
            yield from pending.values()
            pending, size = {}, one.clip.size
        batch = pending.setdefault(one.clip.num_frames, [])
        batch.append(one)
        if len(batch) == batch_size:
            yield pending.pop(one.clip.num_frames)
    yield from pending.values()


def to_pixels(pictures: Tensor) -> Tensor:
    """Pictures (B, F, H, W, 3) in uint8 as the VAE takes them: (B, 3, F, H, W), float32 in [-1, 1]."""
    return rearrange(pictures, "b f h w c -> b c f h w").float().div_(127.5).sub_(1.0)


def _load(clips: Sequence[Clip], num_workers: int) -> Iterator[LoadedClip]:
    """The pictures of clips, sorted by size; all clips of one item come from one decode."""
    by_item: dict[Item, list[Clip]] = {}
    for clip in sorted(clips, key=lambda clip: clip.size):
        by_item.setdefault(clip.item, []).append(clip)
    groups = list(by_item.values())
    for group, pictures in zip(groups, work_ahead(load_clips, groups, num_workers), strict=True):
        yield from map(LoadedClip, group, pictures)


@torch.no_grad()
def _encode_batch(vae: Any, batch: Sequence[LoadedClip], device: torch.device, dtype: torch.dtype) -> None:
    pictures = torch.from_numpy(np.stack([one.pictures for one in batch])).to(device)
    for one, latents in zip(batch, vae.encode(to_pixels(pictures)), strict=True):
        save_latents(one.clip, latents, dtype)


def _describe(clips: Sequence[Clip], *, num_all: int) -> str:
    buckets = Counter((clip.size, clip.num_frames) for clip in clips)
    shown = [f"{describe_size(size)}, {frames} frames: {count}" for (size, frames), count in sorted(buckets.items())]
    return f"{len(clips)} of {num_all} clips to encode{' (' * bool(shown)}{'; '.join(shown)}{')' * bool(shown)}"
