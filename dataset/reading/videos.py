"""Read video files through PyAV: their media information, and their frames as displayed."""

import contextlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from dataset.reading.colours import compose
from dataset.reading.info import ALPHA, HDR, PIXELS, WHITE, Colour, MediaInfo
from dataset.reading.tone import HDR_TRANSFERS, to_sdr
from wan_train.errors import InputError

_UNSPECIFIED = 2  # in H.273's tables
_AHEAD = 16  # packets after a key frame that are searched for frames displayed before it


@dataclass(frozen=True)
class _Rotation:
    """The transform from a decoded to a displayed image: mirrored horizontally first, then rotated left by quarter
    turns."""

    mirrored: bool = False
    quarters: int = 0

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.ascontiguousarray(np.rot90(image[:, ::-1] if self.mirrored else image, self.quarters))


def probe_video(path: Path, *, with_times: bool) -> MediaInfo:
    """Return a video's media information; its first frame is decoded to find its rotation.

    Packets are scanned only for times, or if no index counts the frames; all frames are decoded only if the first ones
    may be undecodable. Raises InputError with the file's name if it cannot be read, or has no time stamps and
    `with_times` is set.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        rate = float(stream.average_rate) if stream.average_rate else None
        packets = container.demux(stream)
        seen, first = _find_first(stream, packets)
        seen += itertools.islice(packets, _AHEAD if stream.codec_context.has_b_frames else 0)
        entries = stream.index_entries
        width, height, reading = _shown_size(stream, first)
        is_whole = _starts_whole(path, stream, seen)
        # The declared count also includes frames that an edit list removes.
        if is_whole and not with_times and stream.frames and len(entries) == stream.frames:
            num_frames = sum(not entry.is_discard for entry in entries)
            return MediaInfo(width, height, num_frames, rate, reading=reading)
        shown = [packet for packet in itertools.chain(seen, packets) if _is_shown(packet)]
        num_frames, times = len(shown), _packet_times(shown, rate) if with_times else ()
    num_stored = num_frames
    if not is_whole:
        seconds = _decode_seconds(path)
        num_frames, times = len(seconds), _frame_times(seconds, rate) if with_times else ()
    if not num_frames:
        raise InputError(f"{path} has no frame that can be decoded: replace it or remove it from its folder")
    if with_times and not times:
        raise InputError(f'{path} has no time stamps: set source_fps to its frame rate instead of "auto"')
    return MediaInfo(width, height, num_frames, rate, times, reading, max(num_stored - num_frames, 0))


def decode_frames(
    path: Path, wanted: Collection[int], background: Colour | None = WHITE
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (index, frame) of the wanted frames of a video, in order; decoding stops after the last one.

    Frames are scaled to square pixels, rotated as the file specifies, tone-mapped to SDR if they are HDR, and composed
    on `background` where they are transparent; with None, their alpha in all three channels.
    """
    remaining = set(wanted)
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # a multithreaded decoder does not report all damage
        turn = None
        for index, frame in enumerate(_decode(container, stream)):
            # A damaged frame corrupts all frames predicted from it, so unwanted frames are checked too.
            if frame.is_corrupt:
                raise InputError(f"{path} is damaged at frame {index}: re-encode it or remove it from its folder")
            turn = turn or _turn_of(frame)
            if index in remaining:
                remaining.remove(index)
                yield index, turn(_to_rgb(stream, frame, background))
            if not remaining:
                return
    raise InputError(f"{path} ends before frame {max(remaining)}: it is truncated; copy it again or re-encode it")


def _decoder(stream: Any) -> Any:
    """Return a stream's decoder: libvpx for a WebM with alpha, which FFmpeg's own VP8 and VP9 decoders drop."""
    with_alpha = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name, "")
    if stream.metadata.get("alpha_mode") != "1" or with_alpha not in av.codecs_available:
        return stream.codec_context
    decoder = av.CodecContext.create(with_alpha, "r")
    decoder.thread_type = "NONE"
    return decoder


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames of a stream."""
    decoder = _decoder(stream)
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _find_first(stream: Any, packets: Iterator[Any]) -> tuple[list[Any], Any]:
    """Return the packets up to the first decoded frame, and that frame or None; damage is reported by decoding."""
    seen, decoder = [], _decoder(stream)
    for packet in packets:
        seen.append(packet)
        try:
            # Flushed at once: the decoder would wait for the frames displayed before and after.
            frames = decoder.decode(packet) or (decoder.decode(None) if packet.is_keyframe else [])
        except av.FFmpegError:
            break
        if frames:
            return seen, frames[0]
        if packet.is_keyframe:
            break
    return seen, None


def _transfer(stream: Any, frame: Any) -> int:
    """Return the H.273 code of an HDR transfer, or 0 for any other."""
    known = (int(frame.color_trc), int(stream.codec_context.color_trc))
    return next((transfer for transfer in known if transfer in HDR_TRANSFERS), 0)


def _shown_size(stream: Any, first: Any) -> tuple[int, int, tuple[str, ...]]:
    """Return the width, height and `MediaInfo.reading` of a video, from its first frame."""
    aspect, turn = _pixel_aspect(stream), _turn_of(first) if first is not None else _Rotation()
    width, height = _square_width(stream.codec_context.width, aspect), stream.codec_context.height
    reading = [f"{PIXELS} {aspect.numerator}:{aspect.denominator}"] * (width != stream.codec_context.width)
    if first is not None and _has_alpha(first) and first.to_ndarray(format="rgba")[..., 3].min() < 255:
        reading.append(ALPHA)
    if first is not None and (transfer := _transfer(stream, first)):
        reading.append(f"{HDR} {HDR_TRANSFERS[transfer]}")
    return (height, width, tuple(reading)) if turn.quarters % 2 else (width, height, tuple(reading))


def _pixel_aspect(stream: Any) -> Fraction:
    """Return the width-to-height ratio of a stored pixel, before rotation."""
    return stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)


def _square_width(width: int, aspect: Fraction) -> int:
    return max(round(width * aspect), 1)


def _has_alpha(frame: Any) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def _to_rgb(stream: Any, frame: Any, background: Colour | None) -> NDArray[np.uint8]:
    """Return a decoded frame with square pixels, (H, W, 3), in SDR; only its width is scaled."""
    size: dict[str, Any] = {}
    width = _square_width(frame.width, _pixel_aspect(stream))
    if width != frame.width:
        way = Interpolation.LANCZOS if width > frame.width else Interpolation.AREA
        size = {"width": width, "height": frame.height, "interpolation": way}
    alpha = frame.to_ndarray(format="rgba", **size)[..., 3] if _has_alpha(frame) else None
    if background is None:
        grey = np.full((frame.height, width), 255, np.uint8) if alpha is None else alpha
        return np.repeat(grey[..., None], 3, axis=2)
    if transfer := _transfer(stream, frame):
        if int(frame.colorspace) == _UNSPECIFIED:
            size["src_colorspace"] = "bt2020"
        return to_sdr(frame.to_ndarray(format="rgb48le", **size), transfer, int(frame.color_primaries))
    rgb: NDArray[np.uint8] = frame.to_ndarray(format="rgb24", **size)
    if alpha is None or alpha.min() == 255:
        return rgb
    return compose(frame.to_ndarray(format="rgba", **size)[..., :3], alpha, background)


def _turn_of(frame: Any) -> _Rotation:
    try:
        matrices = [data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    except ValueError:  # side data of a type unknown to PyAV, such as EXIF
        return _Rotation()
    if not matrices:
        return _Rotation()
    # x' = ax + cy, y' = bx + dy, in steps of 1/65536 and with y downwards; seven more values follow.
    a, b, _, c, d = np.frombuffer(matrices[0], np.int32)[:5].astype(float)
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return _Rotation(mirrored, round(np.arctan2(-b, a) / (np.pi / 2)) % 4)


def _is_shown(packet: Any) -> bool:
    return bool(packet.size) and not packet.is_discard


def _starts_whole(path: Path, stream: Any, packets: Sequence[Any]) -> bool:
    """Return whether all frames among the first packets can be decoded.

    A file that was cut without re-encoding may begin in the middle of a GOP: with frames before its first key frame, or
    with frames that are displayed before it and refer to removed ones (an open GOP).
    """
    held = [packet for packet in packets if packet.size]
    shown = [packet for packet in held if not packet.is_discard]
    if not shown or not stream.codec_context.has_b_frames:
        return not held or bool(held[0].is_keyframe)
    stamps = [packet.pts for packet in shown]
    is_avi = "avi" in stream.container.format.name.split(",")
    # AVI stores H.264 in decoding order, without presentation time stamps: only decoding tells.
    if None in stamps or held[0].pts is None or (is_avi and stamps == sorted(stamps)):
        return len(_decode_seconds(path, num_packets=len(packets))) >= len(shown)
    return bool(held[0].is_keyframe) and min(stamps) >= held[0].pts


def _decode_seconds(path: Path, *, num_packets: int | None = None) -> list[float | None]:
    """Return the start time in seconds of each decodable frame, of all packets or only the first `num_packets`."""
    seconds: list[float | None] = []
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # as frames are read
        for packet in itertools.islice(container.demux(stream), num_packets):
            seconds += [frame.time for frame in stream.codec_context.decode(packet)]
        if num_packets is not None:
            seconds += [frame.time for frame in stream.codec_context.decode(None)]
    return seconds


def _frame_times(seconds: Sequence[float | None], rate: float | None) -> tuple[float, ...]:
    """Return `MediaInfo.times` for frames that begin at these seconds; from the rate if they are not in order."""
    known = [second for second in seconds if second is not None]
    steps = [later - earlier for earlier, later in itertools.pairwise(known)]
    if len(known) == len(seconds) and all(step > 0 for step in steps) and (rate or steps):
        length = 1 / rate if rate else steps[-1]
        return (*(second - known[0] for second in known), known[-1] - known[0] + length)
    return tuple(i / rate for i in range(len(seconds) + 1)) if rate else ()


def _packet_times(packets: Sequence[Any], rate: float | None) -> tuple[float, ...]:
    """Return the start time of each frame and the end time of the last, in seconds from the first, from the packets'
    time stamps; () if there are none.

    AVI stores no presentation time stamps for reordered frames; there, the sorted decoding time stamps form the same
    grid.
    """
    for kind in ("pts", "dts"):
        stamps = sorted(getattr(packet, kind) for packet in packets if getattr(packet, kind) is not None)
        if stamps and len(set(stamps)) == len(packets):
            seconds = [float((stamp - stamps[0]) * packets[0].time_base) for stamp in stamps]
            last = max(packets, key=lambda packet: getattr(packet, kind))
            length = float(last.duration * last.time_base) if last.duration else 1 / rate if rate else 0.0
            return *seconds, seconds[-1] + length
    return tuple(i / rate for i in range(len(packets) + 1)) if rate else ()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with av.open(str(path)) as container:
            contexts = [stream.codec_context for stream in container.streams.video]
            if not contexts or not contexts[0] or not contexts[0].width:
                raise InputError(f"{path} contains no readable video stream: remove it from its folder")
            yield container
    except av.FFmpegError as problem:
        raise InputError(
            f"{path} cannot be decoded ({problem.strerror}): replace it or remove it from its folder"
        ) from None
