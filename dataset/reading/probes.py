"""Media information, read once per state of a file, and which files were found to be broken."""

import dataclasses
from pathlib import Path
from typing import Any

from dataset.caching.manifest import Manifest
from dataset.items import Item
from dataset.reading.info import BLACK, Colour, MediaInfo, recipe_words
from dataset.reading.media import probe
from wan_train.errors import InputError

_READERS = 2  # incremented whenever the readers return something different for unchanged files
# Facts stored by other readers, or with other fields of `MediaInfo`, have a different topic.
_PROBED = f"media {_READERS} {' '.join(field.name for field in dataclasses.fields(MediaInfo))}"
_BROKEN = "broken"


def recall_header(
    path: Path, manifest: Manifest, *, with_times: bool = False, skip_broken: bool = False
) -> MediaInfo | None:
    """Return the result of `probe` for a file.

    Raises InputError if it cannot be read; with `skip_broken`, returns None, also for a file noted as broken.
    """
    try:
        if skip_broken and manifest.noted(_BROKEN, path):
            return None
        kind = f"{_PROBED} timed" if with_times else _PROBED
        found = manifest.recall(kind, path, lambda file: dataclasses.asdict(probe(file, with_times=with_times)))
        return MediaInfo(**{name: _frozen(value) for name, value in found.items()})
    except InputError as problem:
        if not skip_broken:
            raise
        note_broken(manifest, path, problem)
        return None
    except OSError as problem:
        raise InputError(
            f"{path} cannot be read ({problem.strerror}): replace it or remove it from its folder"
        ) from None


def extra_reading(item: Item, condition: str, path: Path, manifest: Manifest) -> str:
    """Return the pixel processing of an accompanying file as stored in a recipe; "" if it is unreadable or has no
    pixels."""
    if condition == "camera":
        return ""
    try:
        header = recall_header(path, manifest)
    except InputError:
        return ""
    if condition in ("mask", "vace_mask"):
        background = mask_background(item) if condition == "mask" else BLACK
        return recipe_words(header.reading if header else (), background, is_video=False)
    return recipe_words(header.reading if header else (), item.config.alpha_background, is_video=item.config.is_video)


def mask_background(item: Item) -> Colour | None:
    """Return the background on which an item's mask is composed (transparent areas have weight 0), or None if its alpha
    is the mask."""
    return None if item.mask == item.path else BLACK


def note_broken(manifest: Manifest, path: Path, problem: InputError) -> None:
    """Record that a file cannot be decoded, until it changes."""
    manifest.note(_BROKEN, path, str(problem))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
