"""The TOML file that describes the data, read into one `DatasetConfig` for each `[[datasets]]` table.

Keys and defaults are those that musubi-tuner's users have in their files; a value of `[general]` holds for every table
that does not set it.
"""

import os
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.config_keys import SHARED_KEYS, SOURCE_KEYS, VIDEO_KEYS
from dataset.frames import floor_frames
from wan_train.cli import InputError, nearest
from wan_train.log import get_logger
from wan_train.models.variants import SIZE_STEP

logger = get_logger(__name__)


@dataclass(frozen=True)
class DatasetConfig:
    """One `[[datasets]]` table with everything resolved; sizes are (width, height) in pixels.

    `number` counts from 1 in the order of the file; `target_frames` are sorted, distinct and of the form 4k+1;
    `listing` is a JSONL or CSV file that names the media in place of `directory`.
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
    frame_stride: int = 1
    max_frames: int = 129
    source_fps: float | None = None
    listing: Path | None = None
    recursive: bool = False
    control_directory: Path | None = None
    mask_directory: Path | None = None
    caption_prefix: str = ""
    caption_variants: str = "none"
    caption_dropout_rate: float = 0.0
    flip_augment: bool = False
    weight: float | None = None
    drop_last: bool = False

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
        if key in SOURCE_KEYS or key in VIDEO_KEYS:
            raise InputError(f"{place}: {key} is each dataset's own: move it below [[datasets]]")
    _refuse_unknown(general, SHARED_KEYS, place, "key")
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
    _refuse_unknown(table, {**SHARED_KEYS, **SOURCE_KEYS, **VIDEO_KEYS}, place, "key")
    values = {**defaults, **_convert(table, place)}
    videos, images = values.pop("video_directory", None), values.pop("image_directory", None)
    if (videos is None) == (images is None):
        raise InputError(f"{place}: takes one of video_directory and image_directory")
    if images and (misplaced := sorted(table.keys() & VIDEO_KEYS.keys())):
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
    readers = {**SHARED_KEYS, **SOURCE_KEYS, **VIDEO_KEYS}
    values = {}
    for key, value in table.items():
        try:
            values[key] = readers[key](value)
        except ValueError as problem:
            raise InputError(f"{place}: {key} = {value!r}: takes {problem}") from None
    return values
