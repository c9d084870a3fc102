"""The source video of video-to-video."""

from dataclasses import replace

from einops import rearrange
from torch import Tensor

from dataset.reading.frames import floor_frames
from wan_train.log import get_logger
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.videos import frame_indices, read_video

log = get_logger(__name__)


def fit_to_source(request: SampleRequest, fps: int) -> SampleRequest:
    """Return the request with at most as many frames as its `video_path` has at `fps`; an image has one.

    Raises InputError for a file that is missing or cannot be read.
    """
    if not request.video_path:
        return request
    available = floor_frames(len(frame_indices("--video_path", request.video_path, fps)))
    if available < request.frames:
        log.info("%s has only %d frames at %d fps: shortening the video to match", request.video_path, available, fps)
    return replace(request, frames=min(request.frames, available))


def read_source(request: SampleRequest, fps: int) -> Tensor:
    """Return pixels (1, 3, F, H, W) in [-1, 1] of the request's `video_path`.

    They are its first F frames at `fps`, scaled to cover the request's size and centre-cropped.
    """
    assert request.video_path
    indices = frame_indices("--video_path", request.video_path, fps)[: request.frames]
    return rearrange(read_video(request.video_path, indices, request.size), "C F H W -> 1 C F H W")
