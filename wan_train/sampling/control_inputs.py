"""Encode the control options of a request into conditions, with the same builders that caching uses.

Legend: C channels of latents, F latent frames, H W latent size, N pixel frames, X Y pixel height and width.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from dataset.batching.buckets import resize_to_bucket
from dataset.reading.info import BLACK
from dataset.reading.media import probe, read_frames
from dataset.reading.stills import read_image
from wan_train.conditions.camera import camera_path
from wan_train.conditions.control import control_latents, reference_latents
from wan_train.conditions.images import Encode
from wan_train.conditions.kinds import CAMERA, CONTROL_LATENTS, MOTION, REFERENCE, VACE_CONTEXT
from wan_train.conditions.vace import vace_context
from wan_train.sampling.controls import inner_size, read_camera, sides_of
from wan_train.sampling.images import load_images, to_image
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.videos import Size, frame_indices, is_still, read_video


def encode_controls(request: SampleRequest, encode: Encode) -> dict[str, Tensor]:
    """Return the conditions of a request's control options, by name of `KINDS` and without the batch dimension."""
    found: dict[str, Tensor] = {}
    if request.control_path:
        pixels = _video("--control_path", request.control_path, request, request.size)
        found[CONTROL_LATENTS] = control_latents(pixels, encode) * request.control_strength
    if request.reference_image:
        (image,) = load_images([request.reference_image], request.size)
        found[REFERENCE] = reference_latents(image, encode)
    if request.reads_vace:
        found[VACE_CONTEXT] = _vace_context(request, encode)
    if request.camera_path:
        found[CAMERA] = read_camera(request.camera_path)[: request.frames]
    elif request.camera_direction:
        origin = request.camera_origin or None
        found[CAMERA] = camera_path(request.camera_direction, request.frames, request.camera_speed, origin)
    if request.motion_bucket_id is not None:
        found[MOTION] = torch.tensor(request.motion_bucket_id, dtype=torch.int32)
    return found


def _vace_context(request: SampleRequest, encode: Encode) -> Tensor:
    """Return the VACE context (96, R+F, H, W).

    The video is grey and generated after its end if the mask is longer, and in the border that `vace_pad` adds.
    """
    shape = request.frames, request.height, request.width
    references = [to_image(read_image(Path(path))) for path in request.vace_reference]
    if not request.vace_video:
        return vace_context(None, None, references, encode, shape=shape)
    left, top, right, bottom = sides_of(request)
    inner = inner_size(request, request.size)
    pixels = _video("--vace_video", request.vace_video, request, inner)
    num_given = pixels.shape[1]
    inside = slice(None, num_given), slice(top, request.height - bottom), slice(left, request.width - right)
    video = torch.zeros(3, *shape)
    video[:, *inside] = pixels
    mask = torch.ones(shape)
    if request.vace_mask:
        mask[inside] = _mask(request, num_given, inner)
    elif request.vace_pad:
        mask[inside] = 0
    return vace_context(video, mask, references, encode, shape=shape)


def _video(flag: str, path: str, request: SampleRequest, size: Size) -> Tensor:
    """Return pixels (3, N, X, Y) of a video, at most as many frames as the request has."""
    return read_video(path, frame_indices(flag, path, request.variant.fps)[: request.frames], size)


def _mask(request: SampleRequest, num_frames: int, size: Size) -> Tensor:
    """Return the mask (N, X, Y) in [0, 1] of the first N frames of `vace_video`.

    It is resized to the video and then cropped like it; transparent areas are black, as in caching.
    """
    assert request.vace_mask and request.vace_video
    path, info = Path(request.vace_mask), probe(Path(request.vace_video))

    def fitted(image: np.ndarray) -> np.ndarray:
        if image.shape[1::-1] != (info.width, info.height):
            image = np.asarray(cv2.resize(image, (info.width, info.height), interpolation=cv2.INTER_AREA), np.uint8)
        return resize_to_bucket(image, size).mean(axis=2, dtype=np.float32) / 255

    if is_still(request.vace_mask):
        return torch.from_numpy(fitted(read_image(path, BLACK))).expand(num_frames, -1, -1)
    indices = frame_indices("--vace_mask", request.vace_mask, request.variant.fps)[:num_frames]
    frames = {index: fitted(image) for index, image in read_frames(path, set(indices), BLACK)}
    return torch.stack([torch.from_numpy(frames[index]) for index in indices])
