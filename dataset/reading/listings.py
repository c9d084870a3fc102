"""The media files of a dataset with their captions, from a folder, a JSONL file or a CSV file. No media are opened."""

import csv
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.config import DatasetConfig
from dataset.config_parsing import reading_text
from dataset.reading.captions import find_caption_files, read_captions, split_variants
from dataset.reading.columns import OF_SOME_TASKS, Columns, read_columns, read_names
from dataset.reading.media import VIDEO_SUFFIXES, is_video
from dataset.reading.stills import IMAGE_SUFFIXES
from wan_train.errors import InputError
from wan_train.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """A media file with its captions (possibly none) and the other values that a listing sets for it."""

    path: Path
    captions: tuple[str, ...]
    columns: Columns = field(default_factory=Columns)


def find_entries(config: DatasetConfig) -> list[Entry]:
    """Return the entries of a dataset: the files of its folder sorted by path, or those of its listing in order.

    Raises InputError for an unreadable folder or listing, invalid lines (with their number) and missing files.
    """
    if config.listing is None:
        found = [Entry(path, captions) for path, captions in _in_folder(config)]
    else:
        read = _read_csv if config.listing.suffix.lower() == ".csv" else _read_jsonl
        found = [_read_row(config, row) for row in read(config, config.listing)]
    if not found:
        kind, suffixes = ("videos", VIDEO_SUFFIXES) if config.is_video else ("images", IMAGE_SUFFIXES)
        where = "folder" if config.listing is None else "file"
        hint = "" if config.listing or config.recursive else "; set recursive = true to include subfolders"
        raise InputError(f"{config}: no {kind} in the {where}; supported: {', '.join(suffixes)}{hint}")
    return found


def _in_folder(config: DatasetConfig) -> Iterator[tuple[Path, tuple[str, ...]]]:
    try:
        is_media = is_video if config.is_video else _is_image
        paths = sorted(path for path in walk_folder(config) if is_media(path) and not path.name.startswith("."))
    except OSError as problem:
        raise InputError(f"{config}: cannot read the folder: {problem.strerror}") from None
    captions = find_caption_files(paths, config.caption_extension, config.caption_variants)
    for path in paths:
        yield path, read_captions(captions[path], config.caption_variants)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def walk_folder(config: DatasetConfig) -> Iterator[Path]:
    """Yield the files and folders in a dataset's folder and, with `recursive`, below it; each real folder is entered
    once.

    Hidden folders and folders of controls, masks, references and camera paths are skipped; a folder of frames counts as
    one video.
    """
    apart = {config.directory.resolve(), *(folder.resolve() for _, folder in config.partner_directories)}
    waiting = [config.directory]
    while waiting:
        for path in waiting.pop().iterdir():
            if not path.is_dir():
                yield path
            elif not path.name.startswith(".") and (real := path.resolve()) not in apart:
                apart.add(real)
                if config.is_video and is_video(path):
                    yield path
                elif config.recursive:
                    waiting.append(path)


@dataclass(frozen=True)
class _Row:
    """A line of a listing: its number, path, captions and other cells, unparsed."""

    number: int
    path: Any
    captions: tuple[Any, ...]
    cells: Mapping[str, Any]


def _read_jsonl(config: DatasetConfig, listing: Path) -> Iterator[_Row]:
    key, names = "video_path" if config.is_video else "image_path", set[str]()
    for number, line in enumerate(_read_lines(listing), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise InputError(f"{listing} line {number} is not JSON: {problem.msg} at column {problem.colno}") from None
        if not isinstance(row, dict) or key not in row:
            raise InputError(f'{listing} line {number}: expected {{"{key}": ..., "caption": ...}}')
        names |= row.keys() - {key, "caption"}
        caption = row.get("caption")
        captions = tuple(caption) if isinstance(caption, list) else () if caption is None else (caption,)
        yield _Row(number, row[key], captions, row)
    _warn_unread(config, names)


def _read_csv(config: DatasetConfig, listing: Path) -> Iterator[_Row]:
    key = "video" if config.is_video else "image"
    reader = csv.DictReader(_read_lines(listing), strict=True)
    try:
        columns = set(reader.fieldnames or ())
        if missing := [name for name in (key, "prompt") if name not in columns]:
            raise InputError(f"{listing} has no column {missing[0]}: the first line must name the columns {key},prompt")
        for row in reader:
            if row[key] is None or row["prompt"] is None or None in row:
                raise InputError(
                    f"{listing} line {reader.line_num}: expected one cell for each column of the first line"
                )
            cells = {name: (cell or "").strip() or None for name, cell in row.items()}
            media = row[key].strip()
            path = str(listing.parent / media) if media else ""
            yield _Row(reader.line_num, path, (row["prompt"],), cells)
    except csv.Error as problem:
        raise InputError(f"{listing} line {reader.line_num + 1} is not CSV: {problem}") from None
    _warn_unread(config, columns - {key, "prompt"})


def _read_row(config: DatasetConfig, row: _Row) -> Entry:
    assert config.listing is not None
    place = f"{config.listing} line {row.number}"
    if not isinstance(row.path, str) or not row.path:
        raise InputError(f"{place}: the path of the {'video' if config.is_video else 'image'} is not a string")
    if not all(isinstance(caption, str) for caption in row.captions):
        raise InputError(f"{place}: the caption is not a string or a list of strings")
    path = Path(row.path).expanduser()
    if not path.is_file() and not (config.is_video and path.is_dir()):
        start = "" if path.is_absolute() else f" (relative paths start at {Path.cwd()})"
        raise InputError(f"{place}: no such file: {path}{start}")
    if not config.is_video and path.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"{place}: {path.name} is not a supported image: use {', '.join(IMAGE_SUFFIXES)}")
    columns = read_columns(row.cells, config, place)
    return Entry(path, split_variants(row.captions, config.caption_variants), columns)


def _read_lines(listing: Path) -> list[str]:
    with reading_text(listing), listing.open(encoding="utf-8-sig", newline="") as file:
        return list(file)


def _warn_unread(config: DatasetConfig, names: Collection[str]) -> None:
    unread = set(names) - read_names(names, config.control)
    if unknown := sorted(unread - OF_SOME_TASKS):
        logger.warning("%s: ignoring unknown columns: %s", config, ", ".join(unknown))
    if of_others := sorted(unread & OF_SOME_TASKS):
        logger.info("%s: ignoring columns that only some tasks read: %s", config, ", ".join(of_others))
