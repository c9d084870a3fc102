"""What is cached beside a clip's latents: those of the mirrored clip and of its control, what a model for images is
given of it, and its loss mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from torch import Tensor

from dataset.batching.buckets import resize_to_bucket
from dataset.caching.extras import (
    CLIP,
    CLIP_FLIPPED,
    CONTROL,
    CONTROL_FLIPPED,
    FLIPPED,
    IMAGE,
    IMAGE_FLIPPED,
    MASK,
    POSITIONS,
    extra_sources,
    wanted_extras,
)
from dataset.caching.manifest import Manifest
from dataset.caching.recipe import Fingerprint, take_fingerprint
from dataset.items import Clip
from dataset.reading.media import is_video, probe, read_frames
from dataset.reading.probes import extra_reading, mask_background
from dataset.reading.stills import read_image
from wan_train.conditions.images import Encode, See, given_latents, one_frame_latents, seen_tokens
from wan_train.errors import InputError
from wan_train.models.one_frame import OneFrame
from wan_train.models.variants import FRAME_STEP, VAE_STRIDE

LATENTS = "latents"


@dataclass(frozen=True)
class ExtraPictures:
    """What goes with a clip: the pictures (F, H, W, 3) of its control, uint8; the mask (F, h, w) of its latent cells.

    `sources` are the files that these are from, by what they are for; `others` the pictures (H, W, 3) that a picture is
    trained beside as one frame of several.
    """

    sources: Mapping[str, Fingerprint] = field(default_factory=dict)
    control: NDArray[np.uint8] | None = None
    mask: NDArray[np.float32] | None = None
    others: tuple[NDArray[np.uint8], ...] = ()


def load_extras(clips: Sequence[Clip], manifest: Manifest) -> list[ExtraPictures]:
    """The controls and masks of clips of one item, in their size and at their frames; one decode for all.

    Raises InputError where one cannot be read, or a mask is too short or has no white in it.
    """
    (item,) = {clip.item for clip in clips}
    sources = {
        kind: take_fingerprint(path, manifest, extra_reading(item, kind, path, manifest))
        for kind, path in extra_sources(item).items()
    }
    background = item.config.alpha_background
    if item.config.one_frame:
        stills = [read_image(path, background) for path in item.controls]
        others = [tuple(resize_to_bucket(still, clip.size) for still in stills) for clip in clips]
        return [ExtraPictures(sources, others=pictures) for pictures in others]
    controls = _load_control(clips) if item.control else [None] * len(clips)
    masks = _load_mask(clips) if item.mask else [None] * len(clips)
    return [ExtraPictures(sources, control, mask) for control, mask in zip(controls, masks, strict=True)]


def encode_extras(
    clips: Sequence[Clip], pictures: Tensor, loaded: Sequence[ExtraPictures], *, encode: Encode, see: See | None = None
) -> list[dict[str, Tensor]]:
    """The tensors that each clip's file holds beside its latents, by kind.

    `pictures` (B, F, H, W, 3) in uint8 are those of the clips; `encode` makes pixels latents, `see` is there where the
    model reads pictures through CLIP. Clips are of one dataset, so that all of them want the same but masks.
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
        for tensors, latents in zip(found, encode(to_pixels(source)), strict=True):
            tensors[kind] = latents
    for image, clip, shown in ((IMAGE, CLIP, pictures), (IMAGE_FLIPPED, CLIP_FLIPPED, sources.get(FLIPPED))):
        if image in kinds:
            assert shown is not None
            for tensors, pixels in zip(found, to_pixels(shown), strict=True):
                tensors |= _image_tensors(clips[0], pixels, (image, clip), encode, see)
    for tensors, extra in zip(found, loaded, strict=True):
        if extra.mask is not None:
            tensors[MASK] = torch.from_numpy(extra.mask)
    return found


def to_pixels(pictures: Tensor) -> Tensor:
    """Pictures (B, F, H, W, 3) in uint8 as the VAE takes them: (B, 3, F, H, W), float32 in [-1, 1]."""
    return rearrange(pictures, "b f h w c -> b c f h w").float().div_(127.5).sub_(1.0)


def _image_tensors(
    clip: Clip, pixels: Tensor, kinds: tuple[str, str], encode: Encode, see: See | None
) -> dict[str, Tensor]:
    """What a model for images is given of a clip with these pixels (3, F, H, W), under the names of its latents and
    its tokens."""
    images = clip.item.config.images
    assert images is not None
    given = [pixels[:, 0].cpu(), pixels[:, -1].cpu()][: 1 + images.last]
    tensors = {kinds[0]: given_latents(given, clip.num_frames, encode)}
    if images.clip:
        tensors[kinds[1]] = _tokens(given[: images.num_clip_images], see)
    return tensors


def one_frame_tensors(
    one_frame: OneFrame, latents: Tensor, controls: Sequence[Tensor], *, encode: Encode, see: See | None
) -> dict[str, Tensor]:
    """What the file of a picture that is trained as one frame of several holds, by kind: its latents (C, 1, H, W)
    among those of the others under LATENTS, and what a model for images is given of these controls (3, H, W)."""
    given = one_frame_latents(controls, one_frame, encode)
    whole, place = given[FRAME_STEP:].clone(), one_frame.target_place
    whole[:, place : place + 1] = latents.to(whole)
    places = torch.tensor(one_frame.positions, dtype=torch.int32)
    return {LATENTS: whole, IMAGE: given, CLIP: _tokens(controls, see), POSITIONS: places}


def _tokens(pictures: Sequence[Tensor], see: See | None) -> Tensor:
    """CLIP's tokens as files hold them: (tokens, width) of a picture, of several one above the other."""
    assert see is not None
    tokens = seen_tokens(pictures, see)
    return tokens.unflatten(0, (len(pictures), -1)) if len(pictures) > 1 else tokens


def average_cells(pictures: NDArray[np.uint8], stride: int = VAE_STRIDE) -> NDArray[np.float32]:
    """A mask's pictures (F, H, W, 3), F = 4k+1, as the mean white, 0 to 1, of each latent cell: (k+1, H/8, W/8), or of
    cells of another stride.

    The first latent frame holds the first picture alone, each further one four.
    """
    grey = pictures.mean(axis=3, dtype=np.float32) / 255
    cells = reduce(grey, "f (h a) (w b) -> f h w", "mean", a=stride, b=stride)
    later = reduce(cells[1:], "(f n) h w -> f h w", "mean", n=FRAME_STEP)
    return np.concatenate([cells[:1], later])


def _load_control(clips: Sequence[Clip]) -> list[NDArray[np.uint8]]:
    clip, path = clips[0], clips[0].item.control
    assert path is not None
    background = clip.item.config.alpha_background
    if not clip.item.config.is_video:
        return [resize_to_bucket(read_image(path, background), clip.size)[None] for clip in clips]
    # A control that ends early stays at its last frame.
    last = probe(path).num_frames - 1
    wanted = {min(index, last) for clip in clips for index in clip.frames}
    pictures = {index: resize_to_bucket(picture, clip.size) for index, picture in read_frames(path, wanted, background)}
    return [np.stack([pictures[min(index, last)] for index in clip.frames]) for clip in clips]


def _load_mask(clips: Sequence[Clip]) -> list[NDArray[np.float32]]:
    clip, path = clips[0], clips[0].item.mask
    assert path is not None
    background = mask_background(clip.item)
    if clip.item.config.is_video and is_video(path):
        wanted = {index for clip in clips for index in clip.frames}
        num_frames = probe(path).num_frames
        if max(wanted) >= num_frames:
            raise InputError(f"{path}: a mask of {num_frames} frames for {clip.item.path}, which is longer: redo it")
        fitted: Mapping[int, NDArray[np.uint8]] = {
            index: _fit_mask(picture, clip) for index, picture in read_frames(path, wanted, background)
        }
    else:
        still = _fit_mask(read_image(path, background), clip)
        fitted = {index: still for clip in clips for index in clip.frames}
    stride = clip.item.config.space.stride
    masks = [average_cells(np.stack([fitted[index] for index in clip.frames]), stride) for clip in clips]
    for clip, mask in zip(clips, masks, strict=True):
        if not mask.any():
            if path == clip.item.path:
                raise InputError(
                    f"{path} is all transparent from frame {clip.start}, and with alpha_mask nothing would be learnt"
                    " from it: give it a mask in mask_directory, or take it out of its folder"
                )
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
