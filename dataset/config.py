"""Parse the TOML or JSON dataset file into one `DatasetConfig` per `[[datasets]]` table.

Keys and defaults are musubi-tuner's; a value in `[general]` applies to every table that does not set it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dataset.config_conditions import settle_conditions
from dataset.config_keys import IMAGE_KEYS, MEDIA_KEYS, SHARED_KEYS, SOURCE_KEYS, VIDEO_KEYS
from dataset.config_parsing import convert, parse_file, refuse_unknown
from dataset.reading.frames import floor_frames
from dataset.reading.info import WHITE, Colour
from wan_train.conditions.camera import SPEED
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.one_frame import OneFrame
from wan_train.models.variants import WAN21, ControlInputs, ImageInputs, LatentSpace

logger = get_logger(__name__)


@dataclass(frozen=True)
class DatasetConfig:
    """One `[[datasets]]` table with all defaults resolved; sizes are (width, height) in pixels.

    `number` counts from 1 in file order. `target_frames` are sorted, distinct and of the form 4k+1. `listing` is a
    JSONL or CSV file that lists the media instead of `directory`, which is then the file's folder.

    `images`, `control` and `space` do not come from the file: they say which frames of a clip the model receives as
    images, which other conditions it receives, and the latent space.

    `mask_directory` holds the loss masks, whichever key set it. `camera_direction` and `camera_speed` apply to files
    without a camera file. `start_image` passes the first frame to a model for which a start image is optional.
    `one_frame` is set when images are trained as one frame of several, as described by the two `fp_1f_*` keys.
    `shares_folder` is true if another dataset of the file reads the folder's media of the other type.
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
    source_fps: float | Literal["auto"] | None = None
    listing: Path | None = None
    recursive: bool = False
    control_directory: Path | None = None
    mask_directory: Path | None = None
    vace_mask_directory: Path | None = None
    reference_directory: Path | None = None
    camera_directory: Path | None = None
    camera_direction: str = ""
    camera_speed: float = SPEED
    motion_bucket_id: int | None = None
    start_image: bool = False
    caption_prefix: str = ""
    caption_variants: str = "none"
    caption_dropout_rate: float = 0.0
    flip_augment: bool = False
    weight: float | None = None
    is_reg: bool = False
    loss_weight: float = 1.0
    drop_last: bool = False
    alpha_background: Colour = WHITE
    alpha_mask: bool = False
    images: ImageInputs | None = None
    control: ControlInputs | None = None
    space: LatentSpace = WAN21
    fp_1f_clean_indices: tuple[int, ...] = ()
    fp_1f_target_index: int | None = None
    one_frame: OneFrame | None = None
    shares_folder: bool = False

    @property
    def num_clip_images(self) -> int:
        """Number of images of a clip that the model receives through CLIP."""
        if self.images is None or not self.images.clip:
            return 0
        return self.images.num_clip_images if self.one_frame is None else len(self.one_frame.controls)

    @property
    def partner_directories(self) -> tuple[tuple[str, Path], ...]:
        """The folders of the files that accompany the media, each with its key."""
        folders = (
            ("mask_directory", self.mask_directory),
            ("mask_directory", self.vace_mask_directory),
            ("control_directory", self.control_directory),
            ("reference_directory", self.reference_directory),
            ("camera_directory", self.camera_directory),
        )
        return tuple((key, folder) for key, folder in folders if folder)

    def __str__(self) -> str:
        return f"dataset {self.number} ({self.listing or self.directory})"


def read_config(
    path: str | os.PathLike[str],
    *,
    with_sources: bool = True,
    images: ImageInputs | None = None,
    control: ControlInputs | None = None,
    space: LatentSpace = WAN21,
    one_frame: bool = False,
) -> tuple[DatasetConfig, ...]:
    """Return all datasets of a TOML file, or of a `.json` file with the same keys, in file order.

    `images`, `control` and `space` are those of the model; with `one_frame`, images are trained as one frame of
    several. Relative paths start at the working directory. Without `with_sources` the media need not exist.

    Raises InputError for a file that does not parse (with the line), unknown or misplaced keys, wrong types, values out
    of range, missing folders and datasets that share a cache folder; the message names the dataset and the key.
    """
    source = Path(path)
    document = parse_file(source)
    refuse_unknown(document, ("general", "datasets"), f"{source}", "table")
    general, tables = document.get("general", {}), document.get("datasets", [])
    if not isinstance(general, dict):
        raise InputError(f"{source}: general must be a table: write [general]")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{source}: datasets must be an array of tables: write [[datasets]] with two brackets")
    if not tables:
        raise InputError(f"{source}: no datasets: add a [[datasets]] with video_directory or image_directory")
    place = f"{source}: [general]"
    for key in general:
        if key in SOURCE_KEYS or key in VIDEO_KEYS or key in IMAGE_KEYS:
            raise InputError(f"{place}: {key} is set per dataset: move it below [[datasets]]")
    refuse_unknown(general, SHARED_KEYS, place, "key")
    defaults = convert(general, place)
    defaults |= {"images": images, "control": control, "space": space}
    configs = _mark_shared([_read_dataset(source, number, table, defaults) for number, table in enumerate(tables, 1)])
    for config in configs if with_sources else ():
        _refuse_missing(config)
    _refuse_shared_caches(configs)
    return tuple(map(_as_one_frame, configs)) if one_frame else configs


def _read_dataset(source: Path, number: int, table: Mapping[str, Any], defaults: Mapping[str, Any]) -> DatasetConfig:
    place = f"{source}: dataset {number}"
    refuse_unknown(table, {**SHARED_KEYS, **SOURCE_KEYS, **VIDEO_KEYS, **IMAGE_KEYS}, place, "key")
    values = {**defaults, **convert(table, place)}
    media = [key for key in MEDIA_KEYS if key in values]
    if len(media) != 1:
        raise InputError(f"{place}: set exactly one of {', '.join(MEDIA_KEYS)}")
    is_video = media[0].startswith("video")
    if not is_video and (misplaced := sorted(table.keys() & VIDEO_KEYS.keys())):
        raise InputError(f"{place}: {misplaced[0]} is only for videos, and this dataset has {media[0]}: remove it")
    if is_video and (misplaced := sorted(table.keys() & IMAGE_KEYS.keys())):
        raise InputError(f"{place}: {misplaced[0]} is only for images, and this dataset has {media[0]}: remove it")
    values |= _find_media(media[0], values.pop(media[0]), values, place)
    values = settle_conditions(values, place)
    config = DatasetConfig(source=source, number=number, is_video=is_video, **values)
    if config.listing and "recursive" in table:
        raise InputError(f"{place}: recursive is only for folders, and this dataset has {media[0]}: remove it")
    _check_size(config, place)
    if asked := table.get("target_frames"):
        _warn_floored(asked, config, place)
    _warn_idle(table, config, place)
    return config


def _find_media(key: str, path: Path, values: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Return `directory`, `listing` and `cache_directory` of a dataset whose media are given by `key`."""
    if key.endswith("_directory"):
        return {"directory": path, "cache_directory": values.get("cache_directory", path)}
    if "cache_directory" not in values:
        raise InputError(f"{location}: {key} may list files in any folder: set cache_directory for their caches")
    return {"directory": path.parent, "listing": path}


def _refuse_missing(config: DatasetConfig) -> None:
    place = f"{config.source}: dataset {config.number}"
    if config.listing and not config.listing.is_file():
        raise InputError(f"{place}: no such file: {config.listing} (relative paths start at {Path.cwd()})")
    media = () if config.listing else (("", config.directory),)
    for key, folder in (*media, *config.partner_directories):
        if not folder.is_dir():
            raise InputError(
                f"{place}: {f'{key}: ' if key else ''}no such folder: {folder} (relative folders start at {Path.cwd()})"
            )


def _check_size(config: DatasetConfig, location: str) -> None:
    step = config.space.size_step
    if min(config.resolution) < step:
        raise InputError(f"{location}: resolution {list(config.resolution)}: each side must be at least {step}")
    floored = tuple(side // step * step for side in config.resolution)
    if not config.enable_bucket and floored != config.resolution:
        raise InputError(
            f"{location}: resolution {list(config.resolution)} must be multiples of {step} without enable_bucket:"
            f" use {list(floored)}"
        )


def _warn_floored(asked: int | list[int], config: DatasetConfig, location: str) -> None:
    given = [asked] if isinstance(asked, int) else asked
    changed = [f"{frames} to {floor_frames(frames)}" for frames in given if floor_frames(frames) != frames]
    if changed:
        taken = ", ".join(map(str, config.target_frames))
        logger.warning(
            "%s: target_frames must be 4k+1, rounded down: %s; using %s", location, ", ".join(changed), taken
        )


def _warn_idle(table: Mapping[str, Any], config: DatasetConfig, location: str) -> None:
    """Warn about frame extraction keys that have no effect."""
    extraction = config.frame_extraction
    if extraction == "uniform" and config.frame_sample == 1:
        logger.warning('%s: frame_extraction "uniform" with frame_sample 1 gives the same clip as "head"', location)
    users = {"frame_sample": "uniform", "frame_stride": "slide", "max_frames": "full"}
    for key, user in users.items():
        if key in table and extraction != user:
            logger.warning('%s: %s has no effect: it is only used with frame_extraction "%s"', location, key, user)
    if "target_frames" in table and extraction == "full":
        logger.warning('%s: target_frames has no effect: frame_extraction "full" uses whole videos', location)


def _as_one_frame(config: DatasetConfig) -> DatasetConfig:
    """Return the dataset with `one_frame` set. Raises InputError if it cannot be trained this way."""
    place = f"{config.source}: dataset {config.number}"
    if config.images is None or not config.images.clip or config.control is not None:
        raise InputError("--one_frame needs a Wan2.1 image task: give --task i2v-14B or flf2v-14B")
    if config.is_video:
        raise InputError(f"{place} has videos, and --one_frame only trains images: remove it from the file")
    if not config.fp_1f_clean_indices or config.fp_1f_target_index is None:
        raise InputError(
            f"{place}: --one_frame needs fp_1f_clean_indices and fp_1f_target_index, such as [0] and 1: the"
            " temporal positions of its control images and of its own image"
        )
    for key in ("flip_augment", "mask_directory", "alpha_mask"):
        if getattr(config, key):
            raise InputError(f"{place}: {key} cannot be combined with --one_frame: remove it")
    try:
        one_frame = OneFrame(config.fp_1f_clean_indices, config.fp_1f_target_index)
    except ValueError as problem:
        raise InputError(f"{place}: fp_1f_clean_indices and fp_1f_target_index: {problem}") from None
    if config.images.last and len(one_frame.controls) != 2:
        raise InputError(f"{place}: fp_1f_clean_indices: an flf2v task takes two images: list two indices")
    return replace(config, one_frame=one_frame)


def _mark_shared(configs: Sequence[DatasetConfig]) -> tuple[DatasetConfig, ...]:
    """Return the datasets with `shares_folder` set where it applies."""
    folders = {(config.directory.resolve(), config.is_video) for config in configs if not config.listing}
    return tuple(
        replace(config, shares_folder=(config.directory.resolve(), not config.is_video) in folders)
        for config in configs
    )


def _refuse_shared_caches(configs: tuple[DatasetConfig, ...]) -> None:
    seen: dict[Path, DatasetConfig] = {}
    for config in configs:
        other = seen.setdefault(config.cache_directory.resolve(), config)
        if other is not config:
            raise InputError(
                f"{config.source}: datasets {other.number} and {config.number} share the cache folder"
                f" {config.cache_directory}: give each a cache_directory of its own"
            )
