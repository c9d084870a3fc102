"""What is cached beside a clip's latents: those of the mirrored clip and of its control, and its loss mask."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from einops import reduce
from numpy.typing import NDArray
from torch import Tensor

from dataset.buckets import resize_to_bucket
from dataset.extras import CONTROL, CONTROL_FLIPPED, FLIPPED, MASK, extra_sources, wanted_extras
from dataset.items import Clip
from dataset.manifest import Manifest
from dataset.media import is_video, probe, read_frames
from dataset.recipe import Fingerprint, take_fingerprint
from dataset.stills import read_image
from wan_train.cli import InputError
from wan_train.models.variants import FRAME_STEP, VAE_STRIDE


@dataclass(frozen=True)
class ExtraPictures:
    """What goes with a clip: the pictures (F, H, W, 3) of its control, uint8; the mask (F, h, w) of its latent cells.

    `sources` are the files that these are from, by what they are for.
    """

    sources: Mapping[str, Fingerprint] = field(default_factory=dict)
    control: NDArray[np.uint8] | None = None
    mask: NDArray[np.float32] | None = None


def load_extras(clips: Sequence[Clip], manifest: Manifest) -> list[ExtraPictures]:
    """The controls and masks of clips of one item, in their size and at their frames; one decode for all.

    Raises InputError where one cannot be read, or a mask is too short or has no white in it.
    """
    (item,) = {clip.item for clip in clips}
    sources = {kind: take_fingerprint(path, manifest) for kind, path in extra_sources(item).items()}
    controls = _load_control(clips) if item.control else [None] * len(clips)
    masks = _load_mask(clips) if item.mask else [None] * len(clips)
    return [ExtraPictures(sources, control, mask) for control, mask in zip(controls, masks, strict=True)]


def encode_extras(
    clips: Sequence[Clip], pictures: Tensor, loaded: Sequence[ExtraPictures], encode: Callable[[Tensor], Tensor]
) -> list[dict[str, Tensor]]:
    """The tensors that each clip's file holds beside its latents, by kind.

    `pictures` (B, F, H, W, 3) in uint8 are those of the clips, on the device of `encode`, which makes them latents
    (B, C, F, H, W); clips are of one dataset, so that all of them want the same but masks.
    """
    found: list[dict[str, Tensor]] = [{} for _ in clips]
    kinds = wanted_extras(clips[0].item)
    sources: dict[str, Tensor] = {}
    if FLIPPED in kinds:
        sources[FLIPPED] = pictures.flip(3)
    if CONTROL in kinds:
        controls = np.stack([extra.control for extra in loaded if extra.control is not None])
        sources[CONTROL] = torch.from_numpy(controls).to(pictures.device)
    if CONTROL_FLIPPED in kinds:
        sources[CONTROL_FLIPPED] = sources[CONTROL].flip(3)
    for kind, source in sources.items():
        for tensors, latents in zip(found, encode(source), strict=True):
            tensors[kind] = latents
    for tensors, extra in zip(found, loaded, strict=True):
        if extra.mask is not None:
            tensors[MASK] = torch.from_numpy(extra.mask)
    return found


def average_cells(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A mask's pictures (F, H, W, 3), F = 4k+1, as the mean white, 0 to 1, of each latent cell: (k+1, H/8, W/8).

    The first latent frame holds the first picture alone, each further one four.
    """
    grey = pictures.mean(axis=3, dtype=np.float32) / 255
    cells = reduce(grey, "f (h a) (w b) -> f h w", "mean", a=VAE_STRIDE, b=VAE_STRIDE)
    later = reduce(cells[1:], "(f n) h w -> f h w", "mean", n=FRAME_STEP)
    return np.concatenate([cells[:1], later])


def _load_control(clips: Sequence[Clip]) -> list[NDArray[np.uint8]]:
    clip, path = clips[0], clips[0].item.control
    assert path is not None
    if not clip.item.config.is_video:
        return [resize_to_bucket(read_image(path), clip.size)[None] for clip in clips]
    # A control that ends early stays at its last frame.
    last = probe(path).num_frames - 1
    wanted = {min(index, last) for clip in clips for index in clip.frames}
    pictures = {index: resize_to_bucket(picture, clip.size) for index, picture in read_frames(path, wanted)}
    return [np.stack([pictures[min(index, last)] for index in clip.frames]) for clip in clips]


def _load_mask(clips: Sequence[Clip]) -> list[NDArray[np.float32]]:
    clip, path = clips[0], clips[0].item.mask
    assert path is not None
    if clip.item.config.is_video and is_video(path):
        wanted = {index for clip in clips for index in clip.frames}
        num_frames = probe(path).num_frames
        if max(wanted) >= num_frames:
            raise InputError(f"{path}: a mask of {num_frames} frames for {clip.item.path}, which is longer: redo it")
        fitted: Mapping[int, NDArray[np.uint8]] = {
            index: _fit_mask(picture, clip) for index, picture in read_frames(path, wanted)
        }
    else:
        still = _fit_mask(read_image(path), clip)
        fitted = {index: still for clip in clips for index in clip.frames}
    masks = [average_cells(np.stack([fitted[index] for index in clip.frames])) for clip in clips]
    for clip, mask in zip(clips, masks, strict=True):
        if not mask.any():
            raise InputError(
                f"{path} is all black for {clip.item.path} from frame {clip.start}: nothing would be learnt from it;"
                " paint what counts white, or take the mask or the file out of its folder"
            )
    return masks


def _fit_mask(picture: NDArray[np.uint8], clip: Clip) -> NDArray[np.uint8]:
    """A mask stretched over the clip's picture and then cropped like it."""
    if picture.shape[1::-1] != clip.source_size:
        picture = np.asarray(cv2.resize(picture, clip.source_size, interpolation=cv2.INTER_AREA), np.uint8)
    return resize_to_bucket(picture, clip.size)
