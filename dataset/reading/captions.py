"""The captions of a file: one, or variants of which training takes one each time."""

import itertools
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from wan_train.errors import InputError

VARIANTS = ("none", "lines", "files")


def find_caption_files(media: Collection[Path], extension: str, variants: str) -> dict[Path, tuple[Path, ...]]:
    """For each media file the caption files beside it: `clip.txt` and, with "files", `clip.1.txt` and so on by number.

    What is the caption of another media file, `clip.1.mp4`, is not a variant of this one's.
    """
    found = {path: [path.with_name(f"{path.stem}{extension}")] for path in media}
    if variants == "files":
        numbered = _find_numbered({path.parent for path in media}, extension)
        owned = {paths[0] for paths in found.values()}
        for paths in found.values():
            paths += [path for path in numbered.get(paths[0], []) if path not in owned]
    return {path: tuple(caption for caption in paths if caption.is_file()) for path, paths in found.items()}


def read_captions(paths: Iterable[Path], variants: str) -> tuple[str, ...]:
    """The captions in files, which are UTF-8; empty where there is no file."""
    return split_variants([_read(path) for path in paths], variants)


def split_variants(texts: Iterable[str], variants: str) -> tuple[str, ...]:
    """Texts without the space around them; with "lines" each line that holds something by itself."""
    if variants != "lines":
        return tuple(text.strip() for text in texts)
    lines = [[stripped for line in text.splitlines() if (stripped := line.strip())] or [""] for text in texts]
    return tuple(itertools.chain.from_iterable(lines))


def _find_numbered(folders: Iterable[Path], extension: str) -> dict[Path, list[Path]]:
    """The numbered caption files of folders, by number, under the path that they would have otherwise."""
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
