"""Images and videos from disk: what a file announces, and the pictures of a clip, (height, width, 3) uint8 each."""

import contextlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from dataset.buckets import resize_to_bucket
from dataset.items import Clip
from dataset.stills import (
    IMAGE_SUFFIXES,
    animation_times,
    folder_times,
    frame_files,
    image_size,
    is_animation,
    read_animation,
    read_folder,
    read_image,
)
from wan_train.cli import InputError

VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".gif")


@dataclass(frozen=True)
class MediaInfo:
    """What a file says of itself: size in pixels as shown, frames to be decoded, frames per second (None: an image).

    `times` is there when asked for: the second at which each frame begins, from 0, and the one at which the last ends.
    """

    width: int
    height: int
    num_frames: int
    fps: float | None
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Turn:
    """How a decoded picture becomes the one shown: mirrored left to right first, then quarter turns to the left."""

    mirrored: bool = False
    quarters: int = 0

    def __call__(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.ascontiguousarray(np.rot90(picture[:, ::-1] if self.mirrored else picture, self.quarters))


def is_frame_folder(path: Path) -> bool:
    """Whether this is a folder with pictures directly in it and no video, which is taken for a video."""
    if not path.is_dir() or not frame_files(path):
        return False
    return not any(file.suffix.lower() in VIDEO_SUFFIXES for file in path.iterdir())


def is_video(path: Path) -> bool:
    """Whether a path is taken for a video: by its suffix, a WebP animation, or a folder of pictures."""
    if path.is_dir():
        return is_frame_folder(path)
    return (path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()) or is_animation(path)


def probe(path: Path, *, with_times: bool = False) -> MediaInfo:
    """Read what a file says of itself; of a video the first frame is decoded, for the way that it is turned.

    The packets of a video are scanned only for its times, or where no index counts its frames. Raises InputError with
    the file's name where it cannot be read, holds no picture, or has no times when they are asked for.
    """
    if path.is_dir():
        if not frame_files(path):
            raise InputError(f"{path} holds no pictures; a folder of frames takes {', '.join(IMAGE_SUFFIXES)}")
        return _timed(image_size(frame_files(path)[0]), folder_times(path), with_times=with_times)
    if is_animation(path):
        return _timed(image_size(path), animation_times(path), with_times=with_times)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return MediaInfo(*image_size(path), 1, None)
    with _opened_video(path) as container:
        return _probe_video(path, container, with_times=with_times)


def read_frames(path: Path, wanted: Collection[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(index, picture) of the wanted frames of a video, in order; nothing after the last of them is decoded.

    Pictures are turned as the file says. Transparency is dropped, more than 8 bits are rounded to 8.
    """
    if path.is_dir():
        yield from read_folder(path, wanted)
    elif is_animation(path):
        yield from read_animation(path, wanted)
    else:
        yield from _decode_frames(path, wanted)


def load_clips(clips: Sequence[Clip]) -> list[NDArray[np.uint8]]:
    """The pictures (F, H, W, 3) of clips of one item, resized and cropped to their bucket; one decode for all."""
    (item,) = {clip.item for clip in clips}
    (size,) = {clip.size for clip in clips}
    if not item.config.is_video:
        return [resize_to_bucket(read_image(item.path), size)[None] for _ in clips]
    wanted = {index for clip in clips for index in clip.frames}
    pictures = {index: resize_to_bucket(picture, size) for index, picture in read_frames(item.path, wanted)}
    return [np.stack([pictures[index] for index in clip.frames]) for clip in clips]


def _timed(size: tuple[int, int], times: tuple[float, ...], *, with_times: bool) -> MediaInfo:
    rate = (len(times) - 1) / times[-1] if times[-1] else None
    return MediaInfo(*size, len(times) - 1, rate, times if with_times and rate else ())


def _probe_video(path: Path, container: Any, *, with_times: bool) -> MediaInfo:
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    rate = float(stream.average_rate) if stream.average_rate else None
    packets = container.demux(stream)
    seen, turn = _find_turn(stream, packets)
    entries = stream.index_entries
    width, height = stream.codec_context.width, stream.codec_context.height
    if turn.quarters % 2:
        width, height = height, width
    # The announced count alone includes what an edit list cuts away.
    if not with_times and stream.frames and len(entries) == stream.frames:
        return MediaInfo(width, height, sum(not entry.is_discard for entry in entries), rate)
    shown = [packet for packet in itertools.chain(seen, packets) if packet.size and not packet.is_discard]
    times = _packet_times(shown, rate) if with_times else ()
    if with_times and shown and not times:
        raise InputError(f'{path} has no time stamps: give its frame rate as source_fps in place of "auto"')
    return MediaInfo(width, height, len(shown), rate, times)


def _find_turn(stream: Any, packets: Iterator[Any]) -> tuple[list[Any], Turn]:
    """The packets up to the first decoded frame, and how it is turned; damage is for the decoding to report."""
    seen, decoder = [], stream.codec_context
    for packet in packets:
        seen.append(packet)
        try:
            # Emptied at once: the decoder would wait for the pictures that are shown before and after.
            frames = decoder.decode(packet) or (decoder.decode(None) if packet.is_keyframe else [])
        except av.FFmpegError:
            break
        if frames:
            return seen, _turn_of(frames[0])
        if packet.is_keyframe:
            break
    return seen, Turn()


def _turn_of(frame: Any) -> Turn:
    try:
        matrices = [data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    except ValueError:  # a kind of side data, EXIF for one, that PyAV has no name for
        return Turn()
    if not matrices:
        return Turn()
    # x' = ax + cy, y' = bx + dy, in steps of 1/65536 and with y downwards; seven more values follow.
    a, b, _, c, d = np.frombuffer(matrices[0], np.int32)[:5].astype(float)
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return Turn(mirrored, round(np.arctan2(-b, a) / (np.pi / 2)) % 4)


def _packet_times(packets: Sequence[Any], rate: float | None) -> tuple[float, ...]:
    """Seconds from the first frame at which each begins and the last ends, from the packets' stamps; () without any.

    AVI stores no presentation stamps for reordered frames; there the decoding stamps, sorted, are the same grid.
    """
    for kind in ("pts", "dts"):
        stamps = sorted(getattr(packet, kind) for packet in packets if getattr(packet, kind) is not None)
        if stamps and len(set(stamps)) == len(packets):
            seconds = [float((stamp - stamps[0]) * packets[0].time_base) for stamp in stamps]
            last = max(packets, key=lambda packet: getattr(packet, kind))
            length = float(last.duration * last.time_base) if last.duration else 1 / rate if rate else 0.0
            return *seconds, seconds[-1] + length
    return tuple(i / rate for i in range(len(packets) + 1)) if rate else ()


def _decode_frames(path: Path, wanted: Collection[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    remaining = set(wanted)
    with _opened_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # with threads the decoder does not report all damage
        turn = None
        for index, frame in enumerate(container.decode(stream)):
            # A damaged frame spoils all that are predicted from it, wanted or not.
            if frame.is_corrupt:
                raise InputError(f"{path} is damaged at frame {index}: re-encode it or take it out of its folder")
            turn = turn or _turn_of(frame)
            if index in remaining:
                remaining.remove(index)
                yield index, turn(frame.to_ndarray(format="rgb24"))
            if not remaining:
                return
    raise InputError(f"{path} ends before frame {max(remaining)}: it is cut off; copy or re-encode it")


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
