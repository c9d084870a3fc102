"""The video that a run begins with in place of noise."""

from dataclasses import replace

from einops import rearrange
from torch import Tensor

from dataset.reading.frames import floor_frames
from wan_train.log import get_logger
from wan_train.sampling.request import SampleRequest
from wan_train.sampling.videos import frame_indices, read_video

log = get_logger(__name__)


def fit_to_source(request: SampleRequest, fps: int) -> SampleRequest:
    """The request with no more frames than its `video_path` has at `fps`; an image has one.

    InputError for a file that is missing or does not read.
    """
    if not request.video_path:
        return request
    available = floor_frames(len(frame_indices("--video_path", request.video_path, fps)))
    if available < request.frames:
        log.info("%s has only %d frames at %d fps: shortening the video to match", request.video_path, available, fps)
    return replace(request, frames=min(request.frames, available))


def read_source(request: SampleRequest, fps: int) -> Tensor:
    """Pixels (1, 3, F, H, W) in [-1, 1] of the request's `video_path`: its first F frames at `fps`, scaled to cover
    the request's size and cropped in the middle."""
    assert request.video_path
    indices = frame_indices("--video_path", request.video_path, fps)[: request.frames]
    return rearrange(read_video(request.video_path, indices, request.size), "C F H W -> 1 C F H W")
