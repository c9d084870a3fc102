"""Which frames of a video make which clips: pure arithmetic, the same as musubi-tuner's."""

from collections.abc import Callable, Sequence

import numpy as np

from wan_train.models.variants import FRAME_STEP

TARGET_FPS = 16.0  # the rate that Wan2.1 was trained at


def floor_frames(num_frames: int) -> int:
    """The greatest clip length 4k+1 that is not above `num_frames` (1 or more): what the VAE takes."""
    return (num_frames - 1) // FRAME_STEP * FRAME_STEP + 1


def kept_frames(num_frames: int, source_fps: float | None, *, target_fps: float = TARGET_FPS) -> tuple[int, ...]:
    """Indices of the frames that remain when a video of `source_fps` is thinned to `target_fps`.

    Frame 0 is kept, and each frame at which `int(i * target_fps / source_fps)` moves on. Nothing is ever repeated, so
    that a slower source keeps all of its frames; so does None.
    """
    if source_fps is None:
        return tuple(range(num_frames))
    ratio = target_fps / source_fps
    return tuple(i for i in range(num_frames) if i == 0 or int(i * ratio) != int((i - 1) * ratio))


def clip_positions(
    num_frames: int, target_frames: Sequence[int], extraction: str, *, frame_sample: int = 1
) -> tuple[tuple[int, int], ...]:
    """(first frame, length) of each clip of a video with `num_frames` (kept) frames, without repeats.

    A target longer than the video gives none.
    """
    starts = EXTRACTIONS[extraction]
    found = ((start, n) for n in target_frames if n <= num_frames for start in starts(num_frames, n, frame_sample))
    return tuple(dict.fromkeys(found))


def _head(num_frames: int, length: int, frame_sample: int) -> list[int]:
    return [0]


def _uniform(num_frames: int, length: int, frame_sample: int) -> list[int]:
    starts: list[int] = np.linspace(0, num_frames - length, frame_sample, dtype=int).tolist()
    return starts


# First frames of the clips, from (frames of the video, frames of a clip, clips wanted).
EXTRACTIONS: dict[str, Callable[[int, int, int], list[int]]] = {"head": _head, "uniform": _uniform}
