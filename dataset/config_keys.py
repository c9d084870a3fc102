"""The keys of a dataset file; a reader returns what the key is set to, or says in a ValueError what it takes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataset.frames import EXTRACTIONS, floor_frames
from wan_train.cli import nearest
from wan_train.models.variants import SIZE_STEP


def _whole(value: Any, what: str, minimum: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(what)
    return value


def _read_count(value: Any) -> int:
    return _whole(value, "a whole number of 1 or more")


def _read_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _read_size(value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    what = f"[width, height] or one whole number, {SIZE_STEP} or more"
    if len(sides) != 2:
        raise ValueError(what)
    return _whole(sides[0], what, SIZE_STEP), _whole(sides[1], what, SIZE_STEP)


def _read_extension(value: Any) -> str:
    if not isinstance(value, str) or not value or "/" in value:
        raise ValueError('the end of a caption file\'s name, such as ".txt"')
    return value if "." in value else f".{value}"


def _read_folder(value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError("the path of a folder")
    return Path(value).expanduser()


def _read_frames(value: Any) -> tuple[int, ...]:
    what = "whole numbers of 1 or more, such as [1, 25, 81]"
    given = value if isinstance(value, list) else [value]
    if not given:
        raise ValueError(what)
    return tuple(sorted({floor_frames(_whole(frames, what)) for frames in given}))


def _read_extraction(value: Any) -> str:
    if value not in EXTRACTIONS:
        hint = nearest(value, EXTRACTIONS) if isinstance(value, str) else ""
        raise ValueError(f"one of {', '.join(EXTRACTIONS)}{hint}")
    return str(value)


def _read_rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError("frames per second, a number above 0")
    return float(value)


SHARED_KEYS: dict[str, Callable[[Any], Any]] = {
    "resolution": _read_size,
    "caption_extension": _read_extension,
    "batch_size": _read_count,
    "num_repeats": _read_count,
    "enable_bucket": _read_switch,
    "bucket_no_upscale": _read_switch,
}
SOURCE_KEYS: dict[str, Callable[[Any], Any]] = {
    "video_directory": _read_folder,
    "image_directory": _read_folder,
    "cache_directory": _read_folder,
}
VIDEO_KEYS: dict[str, Callable[[Any], Any]] = {
    "target_frames": _read_frames,
    "frame_extraction": _read_extraction,
    "frame_sample": _read_count,
    "source_fps": _read_rate,
}
