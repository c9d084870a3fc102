"""Still images: image files, folders of images that form a video, and GIF and WebP animations."""

import contextlib
import itertools
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin

from dataset.reading.colours import describe_reading, to_rgb
from dataset.reading.frames import TARGET_FPS
from dataset.reading.info import TURNED, WHITE, Colour, MediaInfo
from wan_train.errors import InputError

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"),
    *(".jfif", ".jpe", ".tif", ".tiff", ".jp2", ".tga", ".ppm", ".pgm"),
)

_EXIF_ORIENTATION = 0x0112
_TURNED = range(2, 9)  # values of the EXIF tag above that rotate or mirror
_ON_ITS_SIDE = range(5, 9)  # those that swap width and height
_NO_TIME = 0.1  # seconds for a frame with a duration of 0 ms, as in browsers
# What Pillow raises for files that are truncated, damaged or declare absurd sizes.
_PROBLEMS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def image_size(path: Path) -> tuple[int, int]:
    """Return the displayed (width, height) of an image, from its header."""
    info = read_header(path, alone=False)
    return info.width, info.height


def read_header(path: Path, *, alone: bool = True) -> MediaInfo:
    """Return an image's media information, as displayed. It is `alone` unless it is the first frame of several.

    Only greyscale values of more than 8 bits are decoded, for their range, and an image alone with an alpha channel,
    which may be fully opaque. Raises InputError if it cannot be read.
    """
    with _opened(path) as image:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
        size = (image.width, image.height)
        # Pillow rotates TIFF files itself and reports the rotated size.
        if orientation in _ON_ITS_SIDE and not isinstance(image, TiffImagePlugin.TiffImageFile):
            size = (image.height, image.width)
        turned = (TURNED,) if orientation in _TURNED else ()
        return MediaInfo(*size, 1, None, reading=(*describe_reading(image, path, alone=alone), *turned))


def read_image(path: Path, background: Colour | None = WHITE) -> NDArray[np.uint8]:
    """Return an image as 8-bit sRGB, rotated as its EXIF data specifies and composed on `background` where it is
    transparent.

    With `background` None, return its alpha, 0 to 255, in all three channels.
    """
    with _opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image), path, background)


def frame_files(folder: Path) -> list[Path]:
    """Return the images of a folder, sorted by the numbers in their names: 2.png before 10.png; hidden files are
    skipped."""
    try:
        found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    except OSError as problem:
        raise InputError(f"cannot read {folder}: {problem.strerror or problem}") from None
    return sorted(found, key=lambda path: _natural(path.name))


def folder_times(folder: Path) -> tuple[float, ...]:
    """Return the start time of each image of a folder and the end time of the last, in seconds, at 16 fps."""
    return tuple(i / TARGET_FPS for i in range(len(frame_files(folder)) + 1))


def read_folder(
    folder: Path, wanted: Collection[int], background: Colour | None = WHITE
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (index, image) of the wanted images of a folder, as returned by `read_image`. Raises InputError if their
    sizes differ."""
    files = frame_files(folder)
    _refuse_beyond(folder, wanted, len(files))
    size = image_size(files[0])
    for index in sorted(set(wanted)):
        image = read_image(files[index], background)
        if image.shape[1::-1] != size:
            raise InputError(
                f"{files[index]} differs in size from {files[0].name}: all frames of a video must have the same size"
            )
        yield index, image


def is_animation(path: Path) -> bool:
    """Return whether a GIF or WebP file has several frames; False if it cannot be read."""
    if path.suffix.lower() not in _TIMES or not path.is_file():
        return False
    try:
        with _opened(path) as image:
            return bool(getattr(image, "is_animated", False))
    except InputError:
        return False


def animation_times(path: Path) -> tuple[float, ...]:
    """Return the start time of each frame of an animation and the end time of the last, in seconds (not decoded)."""
    return tuple(itertools.accumulate(_TIMES[path.suffix.lower()](path.read_bytes()), initial=0.0))


def _webp_lengths(data: bytes) -> Iterator[float]:
    position = 12
    while position + 24 <= len(data):
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"ANMF":
            # The duration, in milliseconds, follows four fields of three bytes.
            yield int.from_bytes(data[position + 20 : position + 23], "little") / 1000 or _NO_TIME
        position += 8 + length + length % 2


def _gif_lengths(data: bytes) -> Iterator[float]:
    """Yield the duration of each frame, from the blocks of the GIF89a specification.

    A frame without a Graphic Control Extension has no duration, and 10 ms is treated as 0.
    """
    position, delay = 13 + _colour_table(data[10:11]), 0
    while data[position : position + 1] in (b"!", b","):
        if data[position : position + 1] == b"!":
            if data[position + 1 : position + 2] == b"\xf9":
                delay = int.from_bytes(data[position + 4 : position + 6], "little")
            position += 2
        else:
            yield delay / 100 if delay > 1 else _NO_TIME
            delay = 0
            position += 11 + _colour_table(data[position + 9 : position + 10])
        while position < len(data) and data[position]:  # sub-blocks, until an empty one
            position += data[position] + 1
        position += 1


def _colour_table(flags: bytes) -> int:
    """Return the size in bytes of the colour table that a GIF's flags declare."""
    return 3 * 2 ** (flags[0] % 8 + 1) if flags and flags[0] & 0x80 else 0


_TIMES: dict[str, Callable[[bytes], Iterator[float]]] = {".gif": _gif_lengths, ".webp": _webp_lengths}


def read_still(
    path: Path, wanted: Collection[int], background: Colour | None = WHITE
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (0, image) of an image that is treated as a video of one frame."""
    _refuse_beyond(path, wanted, 1)
    yield 0, read_image(path, background)


def read_animation(
    path: Path, wanted: Collection[int], background: Colour | None = WHITE
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (index, image) of the wanted frames of a GIF or WebP animation, in order."""
    with _opened(path) as image:
        _refuse_beyond(path, wanted, getattr(image, "n_frames", 1))
        for index in sorted(set(wanted)):
            image.seek(index)
            yield index, to_rgb(image, path, background)


def _refuse_beyond(path: Path, wanted: Collection[int], num_frames: int) -> None:
    if max(wanted) >= num_frames:
        raise InputError(f"{path} ends before frame {max(wanted)}: it has {num_frames}; replace it")


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts if part]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except _PROBLEMS as problem:
        if isinstance(problem, InputError):
            raise
        raise InputError(
            f"{path} is an incomplete image ({problem}): replace it or remove it from its folder"
        ) from None
