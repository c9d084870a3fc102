"""The captions of a file: one, or several variants, one of which is used per training sample."""

import itertools
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from wan_train.errors import InputError

VARIANTS = ("none", "lines", "files")


def find_caption_files(media: Collection[Path], extension: str, variants: str) -> dict[Path, tuple[Path, ...]]:
    """Return the caption files of each media file: `clip.txt` and, with "files", `clip.1.txt` and so on by number.

    The caption of another media file, such as `clip.1.mp4`, is not a variant.
    """
    found = {path: [path.with_name(f"{path.stem}{extension}")] for path in media}
    if variants == "files":
        numbered = _find_numbered({path.parent for path in media}, extension)
        owned = {paths[0] for paths in found.values()}
        for paths in found.values():
            paths += [path for path in numbered.get(paths[0], []) if path not in owned]
    return {path: tuple(caption for caption in paths if caption.is_file()) for path, paths in found.items()}


def read_captions(paths: Iterable[Path], variants: str) -> tuple[str, ...]:
    """Return the captions in UTF-8 files, and an empty list without any."""
    return split_variants([_read(path) for path in paths], variants)


def split_variants(texts: Iterable[str], variants: str) -> tuple[str, ...]:
    """Return the texts without surrounding white space; with "lines", each non-empty line is a separate caption."""
    if variants != "lines":
        return tuple(text.strip() for text in texts)
    lines = [[stripped for line in text.splitlines() if (stripped := line.strip())] or [""] for text in texts]
    return tuple(itertools.chain.from_iterable(lines))


def _find_numbered(folders: Iterable[Path], extension: str) -> dict[Path, list[Path]]:
    """Return the numbered caption files of folders, in order, by the path that they would have without the number."""
    pattern = re.compile(rf"(.+)\.(\d+){re.escape(extension)}")
    found: dict[Path, list[tuple[int, Path]]] = {}
    for path in (path for folder in folders for path in folder.iterdir()):
        if matched := pattern.fullmatch(path.name):
            found.setdefault(path.with_name(f"{matched[1]}{extension}"), []).append((int(matched[2]), path))
    return {first: [path for _, path in sorted(numbered)] for first, numbered in found.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path} cannot be read as UTF-8 text ({problem}): save it as UTF-8") from None
