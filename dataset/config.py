"""The TOML file that describes the data, read into one `DatasetConfig` for each `[[datasets]]` table.

Keys and defaults are those that musubi-tuner's users have in their files; a value of `[general]` holds for every table
that does not set it.
"""

import math
import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.frames import EXTRACTIONS, floor_frames
from wan_train.cli import InputError, nearest
from wan_train.log import get_logger
from wan_train.models.variants import SIZE_STEP

logger = get_logger(__name__)


@dataclass(frozen=True)
class DatasetConfig:
    """One `[[datasets]]` table with everything resolved; sizes are (width, height) in pixels.

    `number` counts from 1 in the order of the file; `target_frames` are sorted, distinct and of the form 4k+1.
    """

    source: Path
    number: int
    is_video: bool
    directory: Path
    cache_directory: Path
    resolution: tuple[int, int] = (960, 544)
    caption_extension: str = ".txt"
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    target_frames: tuple[int, ...] = (1,)
    frame_extraction: str = "head"
    frame_sample: int = 1
    source_fps: float | None = None

    def __str__(self) -> str:
        return f"dataset {self.number} ({self.directory})"


def read_config(path: str | os.PathLike[str]) -> tuple[DatasetConfig, ...]:
    """Every dataset of a TOML file, in its order. Relative folders start at the working directory, as users know it.

    Raises InputError for a file that does not parse (with the line), unknown or misplaced keys, wrong types, values out
    of range, missing folders and datasets that share a cache folder; the message names dataset and key.
    """
    source = Path(path)
    document = _parse(source)
    _refuse_unknown(document, ("general", "datasets"), f"{source}", "table")
    general, tables = document.get("general", {}), document.get("datasets", [])
    if not isinstance(general, dict):
        raise InputError(f"{source}: general is a table: write [general]")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{source}: datasets is a list of tables: write [[datasets]] with two brackets")
    if not tables:
        raise InputError(f"{source}: no datasets: add a [[datasets]] with video_directory or image_directory")
    place = f"{source}: [general]"
    for key in general:
        if key in _SOURCE_KEYS or key in _VIDEO_KEYS:
            raise InputError(f"{place}: {key} is each dataset's own: move it below [[datasets]]")
    _refuse_unknown(general, _SHARED_KEYS, place, "key")
    defaults = _convert(general, place)
    configs = tuple(_read_dataset(source, number, table, defaults) for number, table in enumerate(tables, 1))
    _refuse_shared_caches(configs)
    return configs


def _parse(source: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(source.read_text(encoding="utf-8-sig"))
    except OSError as problem:
        raise InputError(f"cannot read {source}: {problem.strerror or problem}") from None
    except UnicodeDecodeError:
        raise InputError(f"{source} is not text in UTF-8: save it as UTF-8") from None
    except tomllib.TOMLDecodeError as problem:
        raise InputError(f"{source} is not valid TOML: {problem}") from None


def _read_dataset(source: Path, number: int, table: Mapping[str, Any], defaults: Mapping[str, Any]) -> DatasetConfig:
    place = f"{source}: dataset {number}"
    _refuse_unknown(table, {**_SHARED_KEYS, **_SOURCE_KEYS, **_VIDEO_KEYS}, place, "key")
    values = {**defaults, **_convert(table, place)}
    videos, images = values.pop("video_directory", None), values.pop("image_directory", None)
    if (videos is None) == (images is None):
        raise InputError(f"{place}: takes one of video_directory and image_directory")
    if images and (misplaced := sorted(table.keys() & _VIDEO_KEYS.keys())):
        raise InputError(f"{place}: {misplaced[0]} is for videos and this dataset has image_directory: remove it")
    directory: Path = videos or images
    if not directory.is_dir():
        raise InputError(f"{place}: no such folder: {directory} (relative folders start at {Path.cwd()})")
    values.setdefault("cache_directory", directory)
    config = DatasetConfig(source=source, number=number, is_video=videos is not None, directory=directory, **values)
    _check_size(config, place)
    if asked := table.get("target_frames"):
        _warn_floored(asked, config, place)
    if config.frame_extraction == "uniform" and config.frame_sample == 1:
        logger.warning('%s: frame_extraction "uniform" with frame_sample 1 takes the same clip as "head"', place)
    return config


def _check_size(config: DatasetConfig, place: str) -> None:
    floored = tuple(side // SIZE_STEP * SIZE_STEP for side in config.resolution)
    if not config.enable_bucket and floored != config.resolution:
        raise InputError(
            f"{place}: resolution {list(config.resolution)} without enable_bucket takes multiples of {SIZE_STEP}:"
            f" {list(floored)} would do"
        )


def _warn_floored(asked: int | list[int], config: DatasetConfig, place: str) -> None:
    given = [asked] if isinstance(asked, int) else asked
    changed = [f"{frames} to {floor_frames(frames)}" for frames in given if floor_frames(frames) != frames]
    if changed:
        taken = ", ".join(map(str, config.target_frames))
        logger.warning("%s: target_frames are 4k+1: %s; taken are %s", place, ", ".join(changed), taken)


def _refuse_shared_caches(configs: tuple[DatasetConfig, ...]) -> None:
    seen: dict[Path, DatasetConfig] = {}
    for config in configs:
        other = seen.setdefault(config.cache_directory.resolve(), config)
        if other is not config:
            raise InputError(
                f"{config.source}: datasets {other.number} and {config.number} share the cache folder"
                f" {config.cache_directory}: give each a cache_directory of its own"
            )


def _refuse_unknown(table: Mapping[str, Any], known: Collection[str], place: str, kind: str) -> None:
    for key in table:
        if key not in known:
            hint = nearest(key, known) or f"; known are {', '.join(known)}"
            raise InputError(f"{place}: unknown {kind} {key}{hint}")


def _convert(table: Mapping[str, Any], place: str) -> dict[str, Any]:
    readers = {**_SHARED_KEYS, **_SOURCE_KEYS, **_VIDEO_KEYS}
    values = {}
    for key, value in table.items():
        try:
            values[key] = readers[key](value)
        except ValueError as problem:
            raise InputError(f"{place}: {key} = {value!r}: takes {problem}") from None
    return values


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


_SHARED_KEYS: dict[str, Callable[[Any], Any]] = {
    "resolution": _read_size,
    "caption_extension": _read_extension,
    "batch_size": _read_count,
    "num_repeats": _read_count,
    "enable_bucket": _read_switch,
    "bucket_no_upscale": _read_switch,
}
_SOURCE_KEYS: dict[str, Callable[[Any], Any]] = {
    "video_directory": _read_folder,
    "image_directory": _read_folder,
    "cache_directory": _read_folder,
}
_VIDEO_KEYS: dict[str, Callable[[Any], Any]] = {
    "target_frames": _read_frames,
    "frame_extraction": _read_extraction,
    "frame_sample": _read_count,
    "source_fps": _read_rate,
}
