"""Read input videos at the size and frame rate of the result.

Legend: N pixel frames, X Y pixel height and width.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from dataset.batching.buckets import resize_to_bucket
from dataset.reading.frames import timed_frames
from dataset.reading.media import is_video, probe, read_frames
from dataset.reading.stills import IMAGE_SUFFIXES, read_image
from wan_train.errors import InputError

Size = tuple[int, int]


def frame_indices(flag: str, path: str, fps: int) -> tuple[int, ...]:
    """Return the indices, in the file, of a video's frames at `fps`; an image has one.

    Raises InputError, naming the option, for a file that is missing or cannot be read.
    """
    if not Path(path).exists():
        raise InputError(f"{flag} {path}: no such file")
    try:
        if is_still(path):
            probe(Path(path))
            return (0,)
        return timed_frames(probe(Path(path), with_times=True).times, target_fps=fps)
    except InputError as problem:
        raise InputError(f"{flag}: {problem}") from None


def read_video(path: str, indices: Sequence[int], size: Size) -> Tensor:
    """Return pixels (3, N, X, Y) in [-1, 1] of these frames of a video, or of an image.

    They are scaled to cover `size` (width, height) and centre-cropped, as clips are in caching.
    """
    if is_still(path):
        frames = resize_to_bucket(read_image(Path(path)), size)[None]
    else:
        fitted = {i: resize_to_bucket(image, size) for i, image in read_frames(Path(path), set(indices))}
        frames = np.stack([fitted[index] for index in indices])
    return rearrange(torch.from_numpy(frames).float().div_(127.5).sub_(1.0), "N X Y C -> C N X Y")


def is_still(path: str) -> bool:
    """Whether the file is a single image; anything else is left to the video decoder."""
    return Path(path).is_file() and Path(path).suffix.lower() in IMAGE_SUFFIXES and not is_video(Path(path))
