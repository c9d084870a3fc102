"""Read images and videos: their media information, and the frames of a clip, (height, width, 3) uint8 each."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset.batching.buckets import resize_to_bucket
from dataset.items import Clip
from dataset.reading.info import WHITE, Colour, MediaInfo
from dataset.reading.stills import (
    IMAGE_SUFFIXES,
    animation_times,
    folder_times,
    frame_files,
    is_animation,
    read_animation,
    read_folder,
    read_header,
    read_image,
    read_still,
)
from dataset.reading.videos import decode_frames, probe_video
from wan_train.errors import InputError

VIDEO_SUFFIXES = (
    *(".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".gif"),
    *(".mts", ".m2ts", ".ts", ".3gp", ".3g2", ".ogv", ".vob", ".m2v", ".mxf", ".asf", ".f4v"),
)


def is_frame_folder(path: Path) -> bool:
    """Return whether this is a folder with images directly in it and no video, which is treated as a video."""
    if not path.is_dir() or not frame_files(path):
        return False
    return not any(file.suffix.lower() in VIDEO_SUFFIXES for file in path.iterdir())


def is_video(path: Path) -> bool:
    """Return whether a path is treated as a video: by its suffix, as a WebP animation, or as a folder of images."""
    if path.is_dir():
        return is_frame_folder(path)
    return (path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()) or is_animation(path)


def probe(path: Path, *, with_times: bool = False) -> MediaInfo:
    """Return a file's media information, usually from its header; see `probe_video` for videos.

    Raises InputError with the file's name if it cannot be read, contains no image, or is a video without time stamps
    and `with_times` is set. Images have no times.
    """
    if path.is_dir():
        if not frame_files(path):
            raise InputError(f"{path} contains no images; supported in a folder of frames: {', '.join(IMAGE_SUFFIXES)}")
        return _timed(read_header(frame_files(path)[0], alone=False), folder_times(path), with_times=with_times)
    if is_animation(path):
        return _timed(read_header(path, alone=False), animation_times(path), with_times=with_times)
    if _is_still(path):
        return read_header(path)
    return probe_video(path, with_times=with_times)


def read_frames(
    path: Path, wanted: Collection[int], background: Colour | None = WHITE
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (index, frame) of the wanted frames of a video, in order; decoding stops after the last one. An image is a
    video of one frame.

    Frames are as displayed: with square pixels, rotated as the file specifies, in 8-bit sRGB, and composed on
    `background` where they are transparent; with None, their alpha in all three channels.
    """
    if path.is_dir():
        yield from read_folder(path, wanted, background)
    elif is_animation(path):
        yield from read_animation(path, wanted, background)
    else:
        yield from (read_still if _is_still(path) else decode_frames)(path, wanted, background)


def load_clips(clips: Sequence[Clip]) -> list[NDArray[np.uint8]]:
    """Return the frames (F, H, W, 3) of clips of one item, resized and cropped to their bucket; the file is decoded
    once."""
    (item,) = {clip.item for clip in clips}
    (size,) = {clip.size for clip in clips}
    background = item.config.alpha_background
    if not item.config.is_video:
        return [resize_to_bucket(read_image(item.path, background), size)[None] for _ in clips]
    wanted = {index for clip in clips for index in clip.frames}
    images = {index: resize_to_bucket(image, size) for index, image in read_frames(item.path, wanted, background)}
    return [np.stack([images[index] for index in clip.frames]) for clip in clips]


def _is_still(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _timed(header: MediaInfo, times: tuple[float, ...], *, with_times: bool) -> MediaInfo:
    rate = (len(times) - 1) / times[-1] if times[-1] else None
    return replace(header, num_frames=len(times) - 1, fps=rate, times=times if with_times else ())
