"""Files in other folders that accompany a media file, matched by name: masks, controls, references, camera paths."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.config import DatasetConfig
from dataset.items import CameraSource
from dataset.reading.listings import Entry
from dataset.reading.media import VIDEO_SUFFIXES, is_video
from dataset.reading.stills import IMAGE_SUFFIXES
from wan_train.errors import InputError

_NUMBERED = re.compile(r"(.+)_\d+")
_CAMERA = ".txt"  # as in RealEstate10K


def find_masks(config: DatasetConfig, paths: Sequence[Path]) -> list[Path | None]:
    """Return the mask of each media file, or None: the matching video or folder of frames, else an image, else with
    `alpha_mask` the file itself."""
    alone: list[Path | None] = [path if config.alpha_mask else None for path in paths]
    if config.mask_directory is None:
        return alone
    found = _match_masks(config.mask_directory, paths, video=config.is_video)
    return [mask or other for mask, other in zip(found, alone, strict=True)]


def find_vace_masks(config: DatasetConfig, entries: Sequence[Entry]) -> list[Path | None]:
    """Return the VACE mask of each media file, or None: the one in its listing, else the matching video, folder of
    frames or image in the folder of VACE masks."""
    found: list[Path | None] = [None] * len(entries)
    if config.vace_mask_directory:
        paths = [entry.path for entry in entries]
        found = _match_masks(config.vace_mask_directory, paths, video=config.is_video)
    return [entry.columns.vace_mask or mask for entry, mask in zip(entries, found, strict=True)]


def _match_masks(folder: Path, paths: Sequence[Path], *, video: bool) -> list[Path | None]:
    known = _find_partners(folder, paths)
    return [next(_choices(path, known, video=video, still=True), None) for path in paths]


def find_controls(config: DatasetConfig, entries: Sequence[Entry]) -> list[tuple[Path, ...]]:
    """Return the controls of each media file: those in its listing, else those in `control_directory`; empty if neither
    is set.

    A video matches the video with its full name, else a folder of frames or a video with its stem. An image matches the
    image with its stem, then `stem_0`, `stem_1` and so on, unless these are stems of other images: one, or as many as
    needed for training it as one frame of several. Raises InputError with the names of files without controls; for VACE
    tasks, controls are optional.
    """
    wanted = 1 if config.one_frame is None else len(config.one_frame.controls)
    given = [entry.columns.controls for entry in entries]
    if config.one_frame is None and config.control_directory is None and not any(given):
        return [()] * len(entries)
    matched = match_controls(config.control_directory, [entry.path for entry in entries], video=config.is_video)
    found = [named or beside for named, beside in zip(given, matched, strict=True)]
    if config.control is None or not config.control.vace:
        where = f"in {config.control_directory}" if config.control_directory else f"as control_path in {config.listing}"
        label = "no control" if wanted == 1 else f"fewer than {wanted} controls"
        hint = ": add them, or remove these files from the dataset"
        _refuse_missing(config, entries, [len(controls) >= wanted for controls in found], f"{label} {where}", hint)
    return [controls[:wanted] for controls in found]


def match_controls(folder: Path | None, paths: Sequence[Path], *, video: bool) -> list[tuple[Path, ...]]:
    """Return the matching controls in a folder for each media file, the best first; see `find_controls`."""
    known = _find_partners(folder, paths)
    return [tuple(_choices(path, known, video=video, still=not video)) for path in paths]


def find_references(config: DatasetConfig, entries: Sequence[Entry]) -> list[tuple[Path, ...]]:
    """Return the reference images of each media file: those in its listing, else the image with its stem and then
    `stem_0`, `stem_1` and so on in `reference_directory`.

    Raises InputError for a file with several references if the task reads one.
    """
    known = _find_partners(config.reference_directory, [entry.path for entry in entries])
    found = [
        entry.columns.references or tuple(_choices(entry.path, known, video=False, still=True)) for entry in entries
    ]
    reads_one = config.control is not None and config.control.reference
    for entry, references in zip(entries, found, strict=True):
        if reads_one and len(references) > 1:
            names = ", ".join(map(str, references))
            raise InputError(f"{config}: {entry.path} has {len(references)} references, but the task uses one: {names}")
    return found


def find_cameras(config: DatasetConfig, entries: Sequence[Entry]) -> list[CameraSource | None]:
    """Return the camera path of each media file: the one in its listing, else `stem.txt` in `camera_directory`, else
    the dataset's direction and speed.

    Raises InputError with the names of files without one, for a task that reads camera paths.
    """
    known = _find_partners(config.camera_directory, [entry.path for entry in entries])
    found: list[CameraSource | None] = []
    for entry in entries:
        columns, files = entry.columns, [p for p in known.by_stem.get(entry.path.stem, ()) if p.suffix == _CAMERA]
        if files and not (columns.camera_path or columns.camera_direction):
            found.append(CameraSource(files[0]))
        else:
            found.append(columns.camera(config.camera_direction, config.camera_speed))
    if config.control is not None and config.control.camera:
        where = f" in {config.camera_directory}" if config.camera_directory else ""
        hint = ": set camera_direction, camera_directory or camera_path"
        _refuse_missing(config, entries, [camera is not None for camera in found], f"no camera path{where}", hint)
    return found


def _refuse_missing(
    config: DatasetConfig, entries: Sequence[Entry], is_there: Sequence[bool], partner_name: str, hint: str = ""
) -> None:
    missing = [entry.path.name for entry, there in zip(entries, is_there, strict=True) if not there]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise InputError(f"{config}: {len(missing)} of {len(entries)} files have {partner_name} ({shown}){hint}")


class _Partners(NamedTuple):
    """The sorted files in a folder and below it, by stem, and by the stem that is left without a trailing number,
    unless the numbered stem belongs to a media file."""

    by_stem: dict[str, list[Path]]
    numbered: dict[str, list[str]]


def _find_partners(folder: Path | None, media: Sequence[Path]) -> _Partners:
    known: dict[str, list[Path]] = defaultdict(list)
    numbered: dict[str, list[str]] = defaultdict(list)
    try:
        for root, folders, names in os.walk(folder, onerror=_refuse, followlinks=True) if folder else ():
            for name in sorted(name for name in (*folders, *names) if not name.startswith(".")):
                known[Path(name).stem].append(Path(root, name))
    except OSError as problem:
        raise InputError(f"cannot read {folder}: {problem.strerror or problem}") from None
    stems = {path.stem for path in media}
    for stem in known:
        if stem not in stems and (matched := _NUMBERED.fullmatch(stem)):
            numbered[matched[1]].append(stem)
    return _Partners(known, numbered)


def _choices(path: Path, known: _Partners, *, video: bool, still: bool) -> Iterator[Path]:
    """Yield the files that match a media file, the best first."""
    if video:
        videos = [p for p in known.by_stem.get(path.stem, ()) if p.suffix.lower() in VIDEO_SUFFIXES or p.is_dir()]
        # The full name first, then a folder of frames.
        videos.sort(key=lambda p: (p.name != path.name, not p.is_dir()))
        yield from filter(is_video, videos)
    if not still:
        return
    numbered = [] if video else sorted(known.numbered.get(path.stem, ()), key=lambda stem: int(stem.rpartition("_")[2]))
    images = (p for stem in (path.stem, *numbered) for p in known.by_stem.get(stem, ()))
    yield from (p for p in images if p.suffix.lower() in IMAGE_SUFFIXES)


def _refuse(problem: OSError) -> None:
    raise problem
