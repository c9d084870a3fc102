"""Images and videos from disk: what a file announces, and the pictures of a clip, (height, width, 3) uint8 each."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dataset.buckets import resize_to_bucket
from dataset.items import Clip
from wan_train.cli import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")

# What Pillow raises for files that are cut off, damaged, or claim absurd sizes.
_IMAGE_PROBLEMS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class MediaInfo:
    """What a file says of itself: size in pixels, frames to be decoded, frames per second (None for an image)."""

    width: int
    height: int
    num_frames: int
    fps: float | None


def probe(path: Path) -> MediaInfo:
    """Read a file's header; the packets of a video are scanned only where no index counts its frames.

    Raises InputError with the file's name where it cannot be read or holds no picture.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        with _opened_image(path) as image:
            return MediaInfo(image.width, image.height, 1, None)
    with _opened_video(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate) if stream.average_rate else None
        return MediaInfo(stream.codec_context.width, stream.codec_context.height, _count_frames(container), rate)


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image as RGB; transparency is dropped."""
    with _opened_image(path) as image:
        return np.asarray(image.convert("RGB"))


def read_frames(path: Path, wanted: Collection[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(index, picture) of the wanted frames of a video, in order; nothing after the last of them is decoded."""
    remaining = set(wanted)
    with _opened_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # with threads the decoder does not report all damage
        for index, frame in enumerate(container.decode(stream)):
            # A damaged frame spoils all that are predicted from it, wanted or not.
            if frame.is_corrupt:
                raise InputError(f"{path} is damaged at frame {index}: re-encode it or take it out of its folder")
            if index in remaining:
                remaining.remove(index)
                yield index, frame.to_ndarray(format="rgb24")
            if not remaining:
                return
    raise InputError(f"{path} ends before frame {max(remaining)}: it is cut off; copy or re-encode it")


def load_clips(clips: Sequence[Clip]) -> list[NDArray[np.uint8]]:
    """The pictures (F, H, W, 3) of clips of one item, resized and cropped to their bucket; one decode for all."""
    (item,) = {clip.item for clip in clips}
    (size,) = {clip.size for clip in clips}
    if not item.config.is_video:
        return [resize_to_bucket(read_image(item.path), size)[None] for _ in clips]
    wanted = {index for clip in clips for index in clip.frames}
    pictures = {index: resize_to_bucket(picture, size) for index, picture in read_frames(item.path, wanted)}
    return [np.stack([pictures[index] for index in clip.frames]) for clip in clips]


def _count_frames(container: Any) -> int:
    stream = container.streams.video[0]
    entries = stream.index_entries
    # The announced count alone includes what an edit list cuts away.
    if stream.frames and len(entries) == stream.frames:
        return sum(not entry.is_discard for entry in entries)
    return sum(not packet.is_discard for packet in container.demux(stream) if packet.size)


@contextlib.contextmanager
def _opened_image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except _IMAGE_PROBLEMS as problem:
        if isinstance(problem, InputError):
            raise
        raise InputError(f"{path} is not a whole image ({problem}): replace it or take it out of its folder") from None


@contextlib.contextmanager
def _opened_video(path: Path) -> Iterator[Any]:
    try:
        with av.open(str(path)) as container:
            contexts = [stream.codec_context for stream in container.streams.video]
            if not contexts or not contexts[0] or not contexts[0].width:
                raise InputError(f"{path} holds no video that can be read: take it out of its folder")
            yield container
    except av.FFmpegError as problem:
        raise InputError(
            f"{path} cannot be decoded ({problem.strerror}): replace it or take it out of its folder"
        ) from None
