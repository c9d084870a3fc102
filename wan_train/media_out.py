"""Write videos and images, with a comment that records how they were generated."""

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from wan_train.cli import choose
from wan_train.storage import replacing

COMMENT = "Comment"  # the PNG keyword for any text about an image
RGB = "rgb24"
BT709 = 1  # for matrix, primaries and transfer characteristics alike (ITU-T H.273, tables 2 to 4)


def to_frames(pixels: Tensor) -> np.ndarray:
    """Convert pixels (3, F, H, W) in [-1, 1] to frames (F, H, W, 3) uint8, rounded to nearest."""
    scaled = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(scaled, "C F H W -> F H W C").cpu().numpy()


@dataclass(frozen=True)
class Codec:
    """An FFmpeg encoder, its pixel format, and its default and worst rate factor; 0 is the best."""

    encoder: str
    pixel_format: str
    quality: int
    worst: int
    options: Mapping[str, str] = field(default_factory=dict)


# The same frames must always give the same file. x264's lookahead threads prevent that, and so do macroblock trees with
# B-frames: in PyAV's build they differ from run to run on processors with AVX-512, with any number of threads. libx265
# is missing because PyAV's build writes out of bounds at small sizes.
CODECS: dict[str, Codec] = {
    "h264": Codec("libx264", "yuv420p", 16, 51, {"x264-params": "sync-lookahead=0:mbtree=0"}),
    "vp9": Codec("libvpx-vp9", "yuv420p", 24, 63, {"b": "0", "row-mt": "0"}),
    "lossless": Codec("libx264rgb", RGB, 0, 0, {"preset": "veryfast", "x264-params": "sync-lookahead=0"}),
}


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    *,
    fps: int | Fraction,
    codec: str = "h264",
    quality: int | None = None,
    comment: str = "",
) -> None:
    """Write frames, each (H, W, 3) uint8, as mp4, in BT.709 with even H and W unless the codec uses RGB.

    There must be at least one frame. Each is encoded before the next is requested, so the video is never in memory as a
    whole. `quality` is the codec's constant rate factor, lower is better; `comment` is stored in the metadata.
    """
    chosen = choose("codec", codec, CODECS)
    rate_factor = chosen.quality if quality is None else min(quality, chosen.worst)
    remaining = iter(frames)
    first = next(remaining)
    with replacing(Path(path)) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream(chosen.encoder, rate=Fraction(fps))
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = chosen.pixel_format
        stream.options = {"crf": str(rate_factor), **chosen.options}
        is_yuv = chosen.pixel_format != RGB
        if is_yuv:
            _tag(stream.codec_context)
        for image in itertools.chain([first], remaining):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=RGB)
            container.mux(stream.encode(_to_bt709(frame, chosen.pixel_format) if is_yuv else frame))
        container.mux(stream.encode())


def _tag(context: av.VideoCodecContext) -> None:
    """Tag the stream and the container as BT.709 in limited range; untagged, players guess by the size of the video."""
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = ColorRange.MPEG


def _to_bt709(frame: av.VideoFrame, pixel_format: str) -> av.VideoFrame:
    """Convert an RGB frame to YUV with BT.709 coefficients, limited range."""
    return frame.reformat(format=pixel_format, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)


def write_image(path: str | os.PathLike[str], image: np.ndarray, *, comment: str = "") -> None:
    """Write one frame (H, W, 3) uint8 as PNG, with a comment in its metadata."""
    chunks = PngInfo()
    if comment:
        chunks.add_itxt(COMMENT, comment)
    with replacing(Path(path)) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=chunks)


def write_images(folder: str | os.PathLike[str], frames: Iterable[np.ndarray], *, comment: str = "") -> None:
    """Write frames as FOLDER/NAME_000.png and so on, where NAME is the name of the folder.

    Later frames of an earlier, longer video are deleted. Each frame is written before the next is requested.
    """
    target = Path(folder)
    num_frames = 0
    for index, image in enumerate(frames):
        write_image(target / f"{target.name}_{index:03d}.png", image, comment=comment)
        num_frames = index + 1
    for index in itertools.count(num_frames):
        try:
            (target / f"{target.name}_{index:03d}.png").unlink()
        except FileNotFoundError:
            break


def read_comment(path: str | os.PathLike[str]) -> str | None:
    """Return the comment of a video, a PNG or a folder of PNGs, or None. Raises OSError for an unreadable file."""
    target = Path(path)
    if target.is_dir():
        first = min(target.glob("*.png"), default=None)
        return read_comment(first) if first else None
    if target.suffix.lower() == ".png":
        with Image.open(target) as image:
            return image.info.get(COMMENT)
    with av.open(str(target)) as container:
        return container.metadata.get("comment")
