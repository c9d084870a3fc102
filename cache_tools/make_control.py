"""Make control videos and images from a dataset's own media with OpenCV, without a model."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dataset.caching.remains import remove_remains
from dataset.config import DatasetConfig, read_config
from dataset.reading.listings import find_entries
from dataset.reading.media import probe, read_frames
from dataset.reading.partners import match_controls
from dataset.settings import DatasetSettings
from dataset.sources import refuse_equal_stems
from wan_train.distributed.ranks import find_place
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.media_out import write_image, write_video
from wan_train.storage import check_writable

logger = get_logger(__name__)

Pixels = NDArray[np.uint8]

_EDGES = (100, 200)  # Canny's thresholds, as in OpenCV's tutorial and the preprocessors of ControlNet
_BLUR = 5.0  # pixels, the standard deviation of the Gaussian
_TILE = 8  # pixels per side of a tile
_MOST_DENOMINATOR = 1001  # of frame rates such as 30000/1001


def _grey(image: Pixels) -> Pixels:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)


def _in_three(grey: Pixels) -> Pixels:
    return np.repeat(grey[..., None], 3, axis=2)


def _blur(image: Pixels) -> Pixels:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigmaX=_BLUR), np.uint8)


def _tile(image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    small = cv2.resize(image, (-(-width // _TILE), -(-height // _TILE)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)


# By the choices of `MakeControlSettings`: functions from an image (H, W, 3) to its control, of the same shape.
MAKERS: dict[str, Callable[[Pixels], Pixels]] = {
    "canny": lambda image: _in_three(np.asarray(cv2.Canny(_grey(image), *_EDGES), np.uint8)),
    "gray": lambda image: _in_three(_grey(image)),
    "blur": _blur,
    "tile": _tile,
}


def make_controls(settings: DatasetSettings, control_kind: str) -> None:
    """Write a control of this `control_kind`, one of `MAKERS`, for each media file without one.

    They are written to `control_directory`, or to a folder beside that of the media, or the listing, with `_control`
    appended to its name: videos as lossless mp4 with all frames of the file at its rate and size, images as PNG. Each
    file is written atomically. Raises InputError for files that cannot be read; with `skip_broken`, they are skipped
    with a warning.
    """
    # The folder of controls may not exist yet.
    for config in read_config(settings.dataset_config, with_sources=False):
        folder = config.control_directory or _folder_beside(config)
        check_writable(folder)
        remove_remains(folder)
        # With control_directory set, a folder of controls below that of the media is skipped.
        paths = [entry.path for entry in find_entries(replace(config, control_directory=folder))]
        refuse_equal_stems(config, paths)
        there = match_controls(folder, paths, video=config.is_video)
        due = [path for path, controls in zip(paths, there, strict=True) if not controls]
        num_made = 0
        for path in tqdm(find_place().share(due), desc=control_kind, unit="file", delay=2, leave=False):
            num_made += _make(path, folder, control_kind, config, skip_broken=settings.skip_broken)
        hint = "" if config.control_directory else f'; add control_directory = "{folder}" to the dataset'
        logger.info(
            "%s: wrote %d controls to %s, kept %d existing ones%s",
            config,
            num_made,
            folder,
            len(paths) - len(due),
            hint,
        )


def _folder_beside(config: DatasetConfig) -> Path:
    media = config.directory if config.listing is None else config.listing.with_suffix("")
    return media.with_name(f"{media.name or media.resolve().name}_control")


def _make(path: Path, folder: Path, control_kind: str, config: DatasetConfig, *, skip_broken: bool) -> bool:
    """Write the control of a file; return whether it could be made."""
    try:
        frames = map(MAKERS[control_kind], _read(path, config))
        if config.is_video:
            rate = Fraction(probe(path).fps or config.space.fps).limit_denominator(_MOST_DENOMINATOR)
            write_video(folder / f"{path.stem}.mp4", frames, fps=rate, codec="lossless")
        else:
            write_image(folder / f"{path.stem}.png", next(frames))
    except InputError as problem:
        if not skip_broken:
            raise
        logger.warning("skipped: %s", problem)
        return False
    return True


def _read(path: Path, config: DatasetConfig) -> Iterator[Pixels]:
    """Yield all frames of a file as displayed. Raises InputError for a damaged one."""
    wanted = range(probe(path).num_frames)
    return (image for _, image in read_frames(path, wanted, config.alpha_background))
