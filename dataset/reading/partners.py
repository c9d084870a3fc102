"""Which file of another folder goes with a clip: its loss mask and its control, matched by name."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.config import DatasetConfig
from dataset.reading.listings import Entry
from dataset.reading.media import VIDEO_SUFFIXES, is_video
from dataset.reading.stills import IMAGE_SUFFIXES
from wan_train.errors import InputError

_NUMBERED = re.compile(r"(.+)_\d+")


def find_masks(config: DatasetConfig, paths: Sequence[Path]) -> list[Path | None]:
    """The mask of each media file, or None: the video or folder of frames that goes with it, else a picture, else with
    `alpha_mask` the file itself."""
    alone: list[Path | None] = [path if config.alpha_mask else None for path in paths]
    if config.mask_directory is None:
        return alone
    known = _find_partners(config.mask_directory, paths)
    found = [next(_choices(path, known, video=config.is_video, still=True), None) for path in paths]
    return [mask or other for mask, other in zip(found, alone, strict=True)]


def find_controls(config: DatasetConfig, entries: Sequence[Entry]) -> list[tuple[Path, ...]]:
    """The controls of each media file: what its listing names, else what `control_directory` has; none without both.

    A video takes the video of its whole name, else a folder of frames or a video with its stem; an image takes the
    picture with its stem, then `stem_0`, `stem_1` and so on, unless there is an image of that stem: one, or as many as
    it is trained beside as one frame. Raises InputError with the names of those without.
    """
    wanted = 1 if config.one_frame is None else len(config.one_frame.controls)
    if config.one_frame is None and config.control_directory is None and not any(entry.controls for entry in entries):
        return [()] * len(entries)
    known = _find_partners(config.control_directory, [entry.path for entry in entries])
    is_still = not config.is_video
    found = [
        entry.controls or tuple(_choices(entry.path, known, video=config.is_video, still=is_still)) for entry in entries
    ]
    missing = [entry.path.name for entry, controls in zip(entries, found, strict=True) if len(controls) < wanted]
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        where = f"in {config.control_directory}" if config.control_directory else f"as control_path in {config.listing}"
        what = "no control" if wanted == 1 else f"fewer than {wanted} controls"
        raise InputError(f"{config}: {len(missing)} of {len(entries)} files have {what} {where} ({shown})")
    return [controls[:wanted] for controls in found]


class _Partners(NamedTuple):
    """What lies in a folder and below it, sorted, by stem; and for each stem those that are it with a number, by that,
    but for the stems of media, whose own they are."""

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
    """What goes with a media file, the best first."""
    if video:
        videos = [p for p in known.by_stem.get(path.stem, ()) if p.suffix.lower() in VIDEO_SUFFIXES or p.is_dir()]
        # The whole name first, then a folder of frames.
        videos.sort(key=lambda p: (p.name != path.name, not p.is_dir()))
        yield from filter(is_video, videos)
    if not still:
        return
    numbered = [] if video else sorted(known.numbered.get(path.stem, ()), key=lambda stem: int(stem.rpartition("_")[2]))
    pictures = (p for stem in (path.stem, *numbered) for p in known.by_stem.get(stem, ()))
    yield from (p for p in pictures if p.suffix.lower() in IMAGE_SUFFIXES)


def _refuse(problem: OSError) -> None:
    raise problem
