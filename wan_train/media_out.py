"""Writing videos and pictures, with a comment that says how they came about."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from wan_train.cli import choose
from wan_train.storage import replacing

COMMENT = "Comment"  # the PNG keyword for any text about a picture


def to_frames(pixels: Tensor) -> np.ndarray:
    """Pixels (3, F, H, W) in [-1, 1] to frames (F, H, W, 3) in 0..255, rounded to the nearest."""
    scaled = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(scaled, "C F H W -> F H W C").cpu().numpy()


@dataclass(frozen=True)
class Codec:
    """An encoder of ffmpeg's, the pixels that it takes, and its usual and worst rate factor; 0 is the best."""

    encoder: str
    pixel_format: str
    quality: int
    worst: int
    options: Mapping[str, str] = field(default_factory=dict)


# Without threads that look ahead, the same frames always give the same file. libx265 is not here: the build that PyAV
# brings writes beyond its memory at small sizes.
CODECS: dict[str, Codec] = {
    "h264": Codec("libx264", "yuv420p", 16, 51, {"x264-params": "sync-lookahead=0"}),
    "vp9": Codec("libvpx-vp9", "yuv420p", 24, 63, {"b": "0", "row-mt": "0"}),
    "lossless": Codec("libx264rgb", "rgb24", 0, 0, {"preset": "veryfast", "x264-params": "sync-lookahead=0"}),
}


def write_video(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    *,
    fps: int,
    codec: str = "h264",
    quality: int | None = None,
    comment: str = "",
) -> None:
    """Write frames (F, H, W, 3) uint8 as mp4; H and W must be even.

    `quality` is the codec's constant rate factor, lower is better; `comment` goes into the file's metadata.
    """
    chosen = choose("codec", codec, CODECS)
    rate_factor = chosen.quality if quality is None else min(quality, chosen.worst)
    with replacing(Path(path)) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream(chosen.encoder, rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = chosen.pixel_format
        stream.options = {"crf": str(rate_factor), **chosen.options}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def write_image(path: str | os.PathLike[str], image: np.ndarray, *, comment: str = "") -> None:
    """Write one frame (H, W, 3) uint8 as PNG, with a comment in its metadata."""
    chunks = PngInfo()
    if comment:
        chunks.add_itxt(COMMENT, comment)
    with replacing(Path(path)) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=chunks)


def write_images(folder: str | os.PathLike[str], frames: np.ndarray, *, comment: str = "") -> None:
    """Write frames as FOLDER/NAME_000.png and so on, NAME being the folder's own; what a longer video has left behind
    them goes."""
    target = Path(folder)
    for index, image in enumerate(frames):
        write_image(target / f"{target.name}_{index:03d}.png", image, comment=comment)
    for index in itertools.count(len(frames)):
        try:
            (target / f"{target.name}_{index:03d}.png").unlink()
        except FileNotFoundError:
            break


def read_comment(path: str | os.PathLike[str]) -> str | None:
    """The comment that a video, a PNG or a folder of them carries, or None. OSError for a file that does not read."""
    target = Path(path)
    if target.is_dir():
        first = min(target.glob("*.png"), default=None)
        return read_comment(first) if first else None
    if target.suffix.lower() == ".png":
        with Image.open(target) as image:
            return image.info.get(COMMENT)
    with av.open(str(target)) as container:
        return container.metadata.get("comment")
