"""The optional tensors cached beside a clip's latents: latents of the mirrored clip and of its control, image
conditions, and the loss mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from torch import Tensor

from cache_tools.conditions import Encoders, Given, build_conditions, stacked_tokens
from dataset.batching.buckets import resize_to_bucket
from dataset.caching.extras import (
    CLIP,
    CONTROL,
    CONTROL_FLIPPED,
    FLIPPED,
    IMAGE,
    MASK,
    POSITIONS,
    extra_sources,
    read_references,
    wanted_conditions,
    wanted_extras,
)
from dataset.caching.manifest import Manifest
from dataset.caching.recipe import Fingerprint, take_fingerprint
from dataset.items import Clip
from dataset.reading.info import BLACK, Colour
from dataset.reading.media import is_video, probe, read_frames
from dataset.reading.probes import extra_reading, mask_background
from dataset.reading.stills import read_image
from wan_train.conditions.camera import camera_path, read_camera_file
from wan_train.conditions.control import control_latents
from wan_train.conditions.images import Encode, EncodeClip, one_frame_latents
from wan_train.conditions.kinds import CAMERA, KINDS
from wan_train.errors import InputError
from wan_train.models.one_frame import OneFrame
from wan_train.models.variants import FRAME_STEP, VAE_STRIDE
from wan_train.sampling.images import to_image

LATENTS = "latents"


@dataclass(frozen=True)
class ExtraImages:
    """What accompanies a clip: the frames (F, H, W, 3) of its control, uint8, and the loss mask (F, h, w) of its latent
    cells.

    `sources` are the files these come from, by purpose. `others` are the images (H, W, 3) that an image is trained with
    as one frame of several. `references` are images (H, W, 3), cropped to the clip except for VACE. `vace_mask` (F, H,
    W) is in [0, 1]. `camera` has an entry (F, 19) per frame.
    """

    sources: Mapping[str, Fingerprint] = field(default_factory=dict)
    control: NDArray[np.uint8] | None = None
    mask: NDArray[np.float32] | None = None
    others: tuple[NDArray[np.uint8], ...] = ()
    references: tuple[NDArray[np.uint8], ...] = ()
    vace_mask: NDArray[np.float32] | None = None
    camera: Tensor | None = None


def load_extras(clips: Sequence[Clip], manifest: Manifest) -> list[ExtraImages]:
    """Return what accompanies clips of one item, in their size and at their frames; each file is decoded once.

    Raises InputError if a file cannot be read, a mask or a camera path is too short, or a loss mask is all black.
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
        return [ExtraImages(sources, others=images) for images in others]
    controls = load_controls(clips) if item.control else [None] * len(clips)
    masks = _load_mask(clips) if item.mask else [None] * len(clips)
    references = _load_references(clips[0])
    vace_masks = _load_vace_mask(clips) if "vace_mask" in sources else [None] * len(clips)
    return [
        ExtraImages(sources, control, mask, (), references, vace_mask, _load_camera(clip))
        for clip, control, mask, vace_mask in zip(clips, controls, masks, vace_masks, strict=True)
    ]


def encode_extras(
    clips: Sequence[Clip],
    images: Tensor,
    loaded: Sequence[ExtraImages],
    *,
    encode: Encode,
    see: EncodeClip | None = None,
) -> list[dict[str, Tensor]]:
    """Return the optional tensors of each clip's file, by kind.

    `images` (B, F, H, W, 3) in uint8 are the frames of the clips. `encode` maps pixels to latents; `see` is set if the
    model reads images through CLIP. The clips belong to one dataset, so all or none of them are mirrored.
    """
    found: list[dict[str, Tensor]] = [{} for _ in clips]
    encoders = Encoders(encode, see)
    if clips[0].item.config.flip_augment:
        for tensors, latents in zip(found, encode(to_pixels(images.flip(3))), strict=True):
            tensors[FLIPPED] = latents
    for tensors, clip, pixels, extra in zip(found, clips, to_pixels(images), loaded, strict=True):
        given, kinds = _given_of(clip, pixels, extra), wanted_extras(clip.item)
        for flipped, control in ((False, CONTROL), (True, CONTROL_FLIPPED)):
            if FLIPPED in kinds or not flipped:
                tensors |= build_conditions(given, encoders, flipped=flipped)
            # Cached for every task, as musubi-tuner does.
            if control in kinds and control not in tensors:
                shown = (given.mirrored() if flipped else given).control
                assert shown is not None
                tensors[control] = control_latents(shown, encode)
        if extra.mask is not None:
            tensors[MASK] = torch.from_numpy(extra.mask)
    return found


def _given_of(clip: Clip, pixels: Tensor, extra: ExtraImages) -> Given:
    """Return the inputs of a clip's conditions, with its control and references as pixels."""
    control = None if extra.control is None else to_pixels(torch.from_numpy(extra.control)[None])[0].to(pixels.device)
    references = tuple(to_image(image) for image in extra.references)
    mask = None if extra.vace_mask is None else torch.from_numpy(extra.vace_mask)
    return Given(clip, pixels, control, references, mask, extra.camera)


def to_pixels(images: Tensor) -> Tensor:
    """Return images (B, F, H, W, 3) in uint8 as VAE input: (B, 3, F, H, W), float32 in [-1, 1]."""
    return rearrange(images, "b f h w c -> b c f h w").float().div_(127.5).sub_(1.0)


def one_frame_tensors(
    one_frame: OneFrame, latents: Tensor, controls: Sequence[Tensor], *, encode: Encode, see: EncodeClip | None
) -> dict[str, Tensor]:
    """Return the tensors, by kind, of an image that is trained as one frame of several: its latents (C, 1, H, W)
    combined with those of the others under LATENTS, and the image conditions from the controls (3, H, W)."""
    given = one_frame_latents(controls, one_frame, encode)
    whole, place = given[FRAME_STEP:].clone(), one_frame.target_place
    whole[:, place : place + 1] = latents.to(whole)
    places = torch.tensor(one_frame.positions, dtype=torch.int32)
    return {LATENTS: whole, IMAGE: given, CLIP: stacked_tokens(controls, see), POSITIONS: places}


def average_cells(images: NDArray[np.uint8], stride: int = VAE_STRIDE) -> NDArray[np.float32]:
    """Return the mean white level, 0 to 1, of each latent cell of a mask (F, H, W, 3), F = 4k+1: (k+1, H/8, W/8), or
    with another stride.

    The first latent frame covers only the first image, each further one four.
    """
    grey = images.mean(axis=3, dtype=np.float32) / 255
    cells = reduce(grey, "f (h a) (w b) -> f h w", "mean", a=stride, b=stride)
    later = reduce(cells[1:], "(f n) h w -> f h w", "mean", n=FRAME_STEP)
    return np.concatenate([cells[:1], later])


def load_controls(clips: Sequence[Clip]) -> list[NDArray[np.uint8]]:
    """Return the control frames (F, H, W, 3) of each of an item's clips."""
    clip, path = clips[0], clips[0].item.control
    assert path is not None
    background = clip.item.config.alpha_background
    if not clip.item.config.is_video:
        return [resize_to_bucket(read_image(path, background), clip.size)[None] for clip in clips]
    # A control that ends early repeats its last frame.
    last = probe(path).num_frames - 1
    wanted = {min(index, last) for clip in clips for index in clip.frames}
    images = {index: resize_to_bucket(image, clip.size) for index, image in read_frames(path, wanted, background)}
    return [np.stack([images[min(index, last)] for index in clip.frames]) for clip in clips]


def _load_mask(clips: Sequence[Clip]) -> list[NDArray[np.float32]]:
    clip, path = clips[0], clips[0].item.mask
    assert path is not None
    fitted = _fitted_masks(clips, path, mask_background(clip.item))
    stride = clip.item.config.space.stride
    masks = [average_cells(frames, stride) for frames in fitted]
    for clip, mask in zip(clips, masks, strict=True):
        if not mask.any():
            if path == clip.item.path:
                raise InputError(
                    f"{path} is fully transparent from frame {clip.start}, so with alpha_mask nothing would be learnt"
                    " from it: add a mask in mask_directory, or remove it from its folder"
                )
            raise InputError(
                f"{path} is all black for {clip.item.path} from frame {clip.start}, so nothing would be learnt from it:"
                " paint the areas to train on white, or remove the mask or the file from its folder"
            )
    return masks


def _load_vace_mask(clips: Sequence[Clip]) -> list[NDArray[np.float32]]:
    path = clips[0].item.vace_mask
    assert path is not None
    return [frames.mean(axis=3, dtype=np.float32) / 255 for frames in _fitted_masks(clips, path, BLACK)]


def _fitted_masks(clips: Sequence[Clip], path: Path, background: Colour | None) -> list[NDArray[np.uint8]]:
    """Return the mask frames (F, H, W, 3) for each clip; a still mask applies to all frames."""
    clip = clips[0]
    if clip.item.config.is_video and is_video(path):
        wanted = {index for clip in clips for index in clip.frames}
        num_frames = probe(path).num_frames
        if max(wanted) >= num_frames:
            raise InputError(f"{path}: the mask has {num_frames} frames, fewer than {clip.item.path}: extend it")
        fitted: Mapping[int, NDArray[np.uint8]] = {
            index: _fit_mask(image, clip) for index, image in read_frames(path, wanted, background)
        }
    else:
        still = _fit_mask(read_image(path, background), clip)
        fitted = {index: still for clip in clips for index in clip.frames}
    return [np.stack([fitted[index] for index in clip.frames]) for clip in clips]


def _load_references(clip: Clip) -> tuple[NDArray[np.uint8], ...]:
    """Return the reference images that the model reads, cropped like clips; uncropped for a VACE context."""
    control, background = clip.item.config.control, clip.item.config.alpha_background
    images = [read_image(path, background) for path in read_references(clip.item)]
    whole = control is not None and control.vace
    return tuple(image if whole else resize_to_bucket(image, clip.size) for image in images)


def _load_camera(clip: Clip) -> Tensor | None:
    """Return the camera's entry at each frame of a clip: from its file, or generated by direction and speed from the
    clip's first frame on."""
    camera = clip.item.camera
    if camera is None or KINDS[CAMERA] not in wanted_conditions(clip.item):
        return None
    if camera.path is None:
        return camera_path(camera.direction, clip.num_frames, camera.speed)
    entries = read_camera_file(camera.path)
    if max(clip.frames) >= len(entries):
        raise InputError(
            f"{camera.path} has {len(entries)} camera entries, fewer than the frames of {clip.item.path}: add one"
            " for each"
            " frame of the video"
        )
    return entries[list(clip.frames)]


def _fit_mask(image: NDArray[np.uint8], clip: Clip) -> NDArray[np.uint8]:
    """Stretch a mask to the size of the clip's image, then crop it like the image."""
    if image.shape[1::-1] != clip.source_size:
        image = np.asarray(cv2.resize(image, clip.source_size, interpolation=cv2.INTER_AREA), np.uint8)
    return resize_to_bucket(image, clip.size)
