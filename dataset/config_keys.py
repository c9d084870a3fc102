"""The keys of a dataset file. Each reader returns the parsed value, or raises a ValueError that states what is
expected."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import ImageColor

from dataset.reading.captions import VARIANTS
from dataset.reading.frames import EXTRACTIONS, floor_frames
from dataset.reading.info import Colour
from wan_train.cli import nearest
from wan_train.conditions.camera import DIRECTIONS
from wan_train.models.variants import SIZE_STEP

MOST_MOTION = 100  # highest motion bucket id of DiffSynth-Studio's speed control model


def _whole(value: Any, label: str, minimum: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(label)
    return value


def _read_count(value: Any) -> int:
    return _whole(value, "an integer of 1 or more")


def _read_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _read_size(value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    label = f"[width, height] or one integer, each {SIZE_STEP} or more"
    if len(sides) != 2:
        raise ValueError(label)
    return _whole(sides[0], label, SIZE_STEP), _whole(sides[1], label, SIZE_STEP)


def _read_extension(value: Any) -> str:
    if not isinstance(value, str) or not value or "/" in value:
        raise ValueError('a caption file extension, such as ".txt"')
    return value if "." in value else f".{value}"


def _read_folder(value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError("the path to a folder")
    return Path(value).expanduser()


def _read_listing(suffix: str) -> Callable[[Any], Path]:
    """Return a reader for the path of a file that lists media. Only CSV is recognised by its suffix."""

    def read(value: Any) -> Path:
        if not isinstance(value, str) or not value or (Path(value).suffix.lower() == ".csv") != (suffix == ".csv"):
            raise ValueError(f"the path to a {suffix} file")
        return Path(value).expanduser()

    return read


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string in quotes")
    return value


def _read_colour(value: Any) -> Colour:
    label = 'a colour, such as "white", "#808080" or [128, 128, 128]'
    if isinstance(value, list) and len(value) == 3:
        red, green, blue = (_whole(part, label, 0) for part in value)
        if max(red, green, blue) <= 255:
            return red, green, blue
    try:
        parts = ImageColor.getrgb(value)
    except (ValueError, AttributeError, TypeError):
        raise ValueError(label) from None
    if len(parts) != 3:
        raise ValueError(f"{label}, without alpha")
    return parts


def _read_frames(value: Any) -> tuple[int, ...]:
    label = "integers of 1 or more, such as [1, 25, 81]"
    given = value if isinstance(value, list) else [value]
    if not given:
        raise ValueError(label)
    return tuple(sorted({floor_frames(_whole(frames, label)) for frames in given}))


def _read_indices(value: Any) -> tuple[int, ...]:
    label = "temporal positions as integers from 0, such as [0]"
    if not isinstance(value, list) or not value:
        raise ValueError(label)
    return tuple(_whole(index, label, 0) for index in value)


def _read_index(value: Any) -> int:
    return _whole(value, "a temporal position as an integer from 0", 0)


def _read_word(*words: str) -> Callable[[Any], str]:
    """Return a reader that accepts one of these words."""

    def read(value: Any) -> str:
        if value not in words:
            hint = nearest(value, words) if isinstance(value, str) else ""
            raise ValueError(f"one of {', '.join(words)}{hint}")
        return str(value)

    return read


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_share(value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError("a number from 0 to 1")
    return float(value)


def _read_weight(value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise ValueError("a number above 0")
    return float(value)


def _read_rate(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    if not _is_number(value) or value <= 0:
        raise ValueError('frames per second, a number above 0, or "auto"')
    return float(value)


def read_direction(value: Any) -> str:
    """Return one of `DIRECTIONS`. Raises ValueError, with the expected values, for anything else."""
    return _read_word(*DIRECTIONS)(value)


def read_speed(value: Any) -> float:
    """Return the camera's movement per frame, 0 or more. Raises ValueError, with the expected value, otherwise."""
    if not _is_number(value) or value < 0:
        raise ValueError("the camera's movement per frame, a number of 0 or more")
    return float(value)


def read_motion_bucket(value: Any) -> int:
    """Return a motion bucket id, 0 (slow) to 100 (fast). Raises ValueError, with the expected value, otherwise."""
    label = f"an integer from 0 (slow) to {MOST_MOTION} (fast)"
    if _whole(value, label, 0) > MOST_MOTION:
        raise ValueError(label)
    return int(value)


SHARED_KEYS: dict[str, Callable[[Any], Any]] = {
    "resolution": _read_size,
    "caption_extension": _read_extension,
    "batch_size": _read_count,
    "num_repeats": _read_count,
    "enable_bucket": _read_switch,
    "bucket_no_upscale": _read_switch,
    "recursive": _read_switch,
    "flip_augment": _read_switch,
    "caption_prefix": _read_text,
    "caption_variants": _read_word(*VARIANTS),
    "caption_dropout_rate": _read_share,
    "drop_last": _read_switch,
    "alpha_background": _read_colour,
    "alpha_mask": _read_switch,
    "camera_direction": read_direction,
    "camera_speed": read_speed,
    "motion_bucket_id": read_motion_bucket,
    "start_image": _read_switch,
}
# A dataset sets exactly one of these: the location of its media, and whether they are videos or images.
MEDIA_KEYS: dict[str, Callable[[Any], Any]] = {
    "video_directory": _read_folder,
    "image_directory": _read_folder,
    "video_jsonl_file": _read_listing(".jsonl"),
    "image_jsonl_file": _read_listing(".jsonl"),
    "video_csv_file": _read_listing(".csv"),
    "image_csv_file": _read_listing(".csv"),
}
SOURCE_KEYS: dict[str, Callable[[Any], Any]] = {
    **MEDIA_KEYS,
    "cache_directory": _read_folder,
    "weight": _read_weight,
    "is_reg": _read_switch,
    "loss_weight": _read_weight,
    "mask_directory": _read_folder,
    "loss_mask_directory": _read_folder,
    "reference_directory": _read_folder,
    "camera_directory": _read_folder,
    "control_directory": _read_folder,
}
VIDEO_KEYS: dict[str, Callable[[Any], Any]] = {
    "target_frames": _read_frames,
    "frame_extraction": _read_word(*EXTRACTIONS),
    "frame_sample": _read_count,
    "frame_stride": _read_count,
    "max_frames": _read_count,
    "source_fps": _read_rate,
}
# Temporal positions of images that are trained as one frame of several.
IMAGE_KEYS: dict[str, Callable[[Any], Any]] = {
    "fp_1f_clean_indices": _read_indices,
    "fp_1f_target_index": _read_index,
}
