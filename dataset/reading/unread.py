"""Find the files in a dataset's folder that are ignored, so that they can be reported. No file is opened."""

import mimetypes
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dataset.caching.manifest import MANIFEST
from dataset.config import DatasetConfig
from dataset.reading.listings import walk_folder
from dataset.reading.media import VIDEO_SUFFIXES
from dataset.reading.stills import IMAGE_SUFFIXES


@dataclass(frozen=True)
class UnreadFile:
    """A file that is ignored, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path.name} ({self.reason})"


def find_unread(config: DatasetConfig, media: Collection[Path]) -> list[UnreadFile]:
    """Return the files in a dataset's folder that look like training data and are not among its `media`, sorted.

    These are files of the other media type, captions without a media file, and files that are named like media or have
    a caption. Files of the other type are left out if another dataset reads them from the same folder. Empty for a
    listing.
    """
    if config.listing:
        return []
    read = set(media)
    files = sorted(path for path in walk_folder(config) if path not in read and not path.name.startswith("."))
    captions = {path: path.name.removesuffix(config.caption_extension) for path in files if _is_caption(path, config)}
    with_caption = {(path.parent, name) for path, name in captions.items()}
    of_media = {(path.parent, path.stem) for path in media}
    of_others = {(path.parent, path.stem) for path in files if path not in captions}
    others = IMAGE_SUFFIXES if config.is_video else VIDEO_SUFFIXES
    found = []
    for path in files:
        named = (path.parent, captions.get(path, path.stem))
        if path in captions:
            if named not in of_others and not _has_owner(path.parent, captions[path], config, of_media):
                found.append(UnreadFile(path, "a caption without a media file"))
        elif path.name == MANIFEST or path.suffix == ".safetensors" or not path.is_file():
            continue
        elif path.suffix.lower() in others:
            if not config.shares_folder:
                found.append(UnreadFile(path, "an image" if config.is_video else "a video"))
        elif named not in of_media and (named in with_caption or _is_named_like_media(path)):
            found.append(UnreadFile(path, f"{path.suffix or 'a file without suffix'} is not supported"))
    return found


def _is_caption(path: Path, config: DatasetConfig) -> bool:
    return path.name.endswith(config.caption_extension)


def _has_owner(folder: Path, name: str, config: DatasetConfig, stems: Collection[tuple[Path, str]]) -> bool:
    """Return whether a caption of this name, or a numbered variant, belongs to one of the media with these stems."""
    numbered = re.fullmatch(r"(.+)\.\d+", name) if config.caption_variants == "files" else None
    return (folder, name) in stems or bool(numbered and (folder, numbered[1]) in stems)


def _is_named_like_media(path: Path) -> bool:
    guessed = mimetypes.guess_type(path.name)[0] or ""
    return guessed.startswith(("image/", "video/"))
