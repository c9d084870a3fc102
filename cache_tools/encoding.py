"""Encode loaded clips and write their cache files."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_tools.extras import LATENTS, ExtraImages, encode_extras, one_frame_tensors, to_pixels
from dataset.caching.cache import save_latents
from dataset.caching.extras import CLIP, wanted_extras
from dataset.caching.recipe import Fingerprint, Recipe, gives_last, names_camera, places_in_time
from dataset.items import Clip
from wan_train.models.encoders.image import ImageEncoder
from wan_train.precision import name_of
from wan_train.sampling.images import to_image


@dataclass(frozen=True)
class LoadedClip:
    """A clip with its frames (F, H, W, 3) in uint8, the fingerprint of its file, and its accompanying images."""

    clip: Clip
    frames: NDArray[np.uint8]
    source: Fingerprint
    extras: ExtraImages = field(default_factory=ExtraImages)


@dataclass(frozen=True)
class LatentEncoder:
    """A VAE with its file, device and output dtype, and CLIP for models that read frames through it."""

    vae: Any
    model: Fingerprint
    device: torch.device
    dtype: torch.dtype
    images: ImageEncoder | None = None
    image_model: Fingerprint | None = None

    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents (B, C, F', H', W') of pixels (B, 3, F, H, W) on any device."""
        latents: Tensor = self.vae.encode(pixels.to(self.device))
        return latents


def batch_clips(loaded: Iterable[LoadedClip], batch_size: int) -> Iterator[list[LoadedClip]]:
    """Yield batches of at most `batch_size` clips of the same size and length.

    If clips arrive sorted by size, at most one incomplete batch per length is held.
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


@torch.no_grad()
def encode_batch(encoder: LatentEncoder, batch: Sequence[LoadedClip]) -> None:
    """Encode clips of the same size and length and write their files."""
    frames = torch.from_numpy(np.stack([one.frames for one in batch])).to(encoder.device)
    images = batch[0].clip.item.config.images
    # One at a time if the clip's own first frame is the condition, to be bit-identical to what previews encode.
    apart = 1 if images is not None and images.fused else len(batch)
    latents = torch.cat([encoder.encode(part) for part in to_pixels(frames).split(apart)])
    if one_frame := batch[0].clip.item.config.one_frame:
        for one, its in zip(batch, latents, strict=True):
            others = [to_image(image) for image in one.extras.others]
            tensors = one_frame_tensors(one_frame, its, others, encode=encoder.encode, see=encoder.images)
            whole = tensors.pop(LATENTS)
            save_latents(one.clip, whole, encoder.dtype, _make_recipe(one, encoder), extras=tensors)
        return
    extras = encode_extras(
        [one.clip for one in batch],
        frames,
        [one.extras for one in batch],
        encode=encoder.encode,
        see=encoder.images,
    )
    for one, its, beside in zip(batch, latents, extras, strict=True):
        save_latents(one.clip, its, encoder.dtype, _make_recipe(one, encoder), extras=beside)


def name_clip(one: LoadedClip) -> str:
    """Return a clip's file and first frame, for messages."""
    return f"{one.clip.item.path} from frame {one.clip.start}"


def _make_recipe(one: LoadedClip, encoder: LatentEncoder) -> Recipe:
    clip = one.clip
    seen = encoder.image_model if CLIP in wanted_extras(clip.item) else None
    return Recipe(
        model=encoder.model,
        dtype=name_of(encoder.dtype),
        source=one.source,
        start=clip.start,
        frames=clip.frames,
        size=clip.size,
        positions=places_in_time(clip.item.config),
        last=gives_last(clip.item.config),
        extras=dict(one.extras.sources) | ({CLIP: seen} if seen else {}),
        camera=names_camera(clip.item),
        motion_bucket=clip.item.motion_bucket_id,
    )
