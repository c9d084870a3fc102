"""The video that a run begins with in place of noise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from dataset.batching.buckets import resize_to_bucket
from dataset.reading.frames import floor_frames, timed_frames
from dataset.reading.media import is_video, probe, read_frames
from dataset.reading.stills import IMAGE_SUFFIXES, read_image
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.sampling.request import SampleRequest

log = get_logger(__name__)


def fit_to_source(request: SampleRequest, fps: int) -> SampleRequest:
    """The request with no more frames than its `video_path` has at `fps`; a picture has one.

    InputError for a file that is missing or does not read.
    """
    if not request.video_path:
        return request
    available = floor_frames(len(_frame_indices(Path(request.video_path), fps)))
    if available < request.frames:
        log.info("%s has frames for %d at %d a second: making so many", request.video_path, available, fps)
    return replace(request, frames=min(request.frames, available))


def read_source(request: SampleRequest, fps: int) -> Tensor:
    """Pixels (1, 3, F, H, W) in [-1, 1] of the request's `video_path`: its first F frames at `fps`, scaled to cover
    the request's size and cropped in the middle."""
    assert request.video_path
    path, size = Path(request.video_path), (request.width, request.height)
    if not _is_picture(path):
        indices = _frame_indices(path, fps)[: request.frames]
        pictures = {i: resize_to_bucket(picture, size) for i, picture in read_frames(path, set(indices))}
        frames = np.stack([pictures[index] for index in indices])
    else:
        frames = resize_to_bucket(read_image(path), size)[None]
    return rearrange(torch.from_numpy(frames).float() / 127.5 - 1, "F H W C -> 1 C F H W")


def _frame_indices(path: Path, fps: int) -> tuple[int, ...]:
    if not path.exists():
        raise InputError(f"--video_path {path}: no such file")
    if _is_picture(path):
        probe(path)
        return (0,)
    return timed_frames(probe(path, with_times=True).times, target_fps=fps)


def _is_picture(path: Path) -> bool:
    """Whether it is one picture; whatever is none is left to the decoder of videos, by any name."""
    return path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES and not is_video(path)
