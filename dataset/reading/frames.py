"""Which frames of a video form which clips: pure arithmetic, the same as musubi-tuner's."""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np

from wan_train.models.variants import FRAME_STEP

EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")
TARGET_FPS = 16.0  # the frame rate that Wan2.1 was trained at
_ROUNDING = 0.0011  # seconds; two time stamps, each rounded to a millisecond


def floor_frames(num_frames: int) -> int:
    """Return the greatest clip length 4k+1 that is at most `num_frames` (1 or more), as the VAE requires."""
    return (num_frames - 1) // FRAME_STEP * FRAME_STEP + 1


def kept_frames(num_frames: int, source_fps: float | None, *, target_fps: float = TARGET_FPS) -> tuple[int, ...]:
    """Return the indices of the frames kept when a video is resampled from `source_fps` to `target_fps`.

    Frame 0 is kept, and each frame i at which `int(i * target_fps / source_fps)` increases. Frames are never repeated,
    so a slower source keeps all of its frames, as with `source_fps` None.
    """
    if source_fps is None:
        return tuple(range(num_frames))
    ratio = target_fps / source_fps
    return tuple(i for i in range(num_frames) if i == 0 or int(i * ratio) != int((i - 1) * ratio))


def timed_frames(times: Sequence[float], *, target_fps: float = TARGET_FPS) -> tuple[int, ...]:
    """Return the index of the frame shown at each k / `target_fps` s, so that the clip keeps the speed of the source.

    `times` are the start times of the frames in seconds, sorted and from 0, followed by the end time of the last. A
    frame shown for longer than one step is repeated; one shown only between two steps is dropped.
    """
    # Containers round to a millisecond: a frame may begin up to half a millisecond late and still belong to its step.
    starts, end = times[:-1], times[-1] - _ROUNDING
    steps = itertools.takewhile(lambda second: second < end, (k / target_fps for k in itertools.count()))
    return tuple(bisect.bisect_right(starts, second + _ROUNDING) - 1 for second in steps)


def clip_positions(
    num_frames: int,
    target_frames: Sequence[int],
    extraction: str,
    *,
    frame_sample: int = 1,
    frame_stride: int = 1,
    max_frames: int = 129,
) -> tuple[tuple[int, int], ...]:
    """Return (first frame, length) of each clip of a video with `num_frames` (kept) frames, without duplicates.

    `extraction` is one of `EXTRACTIONS`. A target longer than the video gives no clip; "full" gives one clip,
    regardless of the targets. All counts are 1 or more.
    """
    if extraction == "full":
        return ((0, floor_frames(min(num_frames, max_frames))),) if num_frames else ()

    def starts(length: int) -> Iterable[int]:
        last = num_frames - length
        match extraction:
            case "head":
                return (0,)
            case "chunk":
                return range(0, last + 1, length)
            case "slide":
                return range(0, last + 1, frame_stride)
        assert extraction == "uniform", extraction
        return cast("list[int]", np.linspace(0, last, frame_sample, dtype=int).tolist())

    return tuple(dict.fromkeys((start, n) for n in target_frames if n <= num_frames for start in starts(n)))
