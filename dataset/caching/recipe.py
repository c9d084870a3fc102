"""The recipe of a cache: what it was made from, stored in its metadata and compared with the current files.

Equal size and modification time mean an unchanged file; contents are read only if they differ.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dataset.caching.manifest import Manifest
from dataset.config import DatasetConfig
from dataset.items import Item
from wan_train.models.fingerprint import file_hash
from wan_train.shards import INDEX, expand

RECIPE_KEY = "wan_train_recipe"
_VERSION = 1


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a file; for a folder or a set of shards, the sum of sizes, the latest modification and a hash over
    all.

    `reading` describes the pixel processing of a media file beyond decoding; older caches have none.
    """

    name: str
    size: int
    mtime_ns: int
    sha256: str
    reading: str = ""


@dataclass(frozen=True)
class Recipe:
    """What a cache was made from, and how; a caption's recipe has no source, frames and size.

    `frames` are the indices of the decoded frames, `size` the bucket (width, height) in pixels, and `extras` the other
    files that went in, by purpose. `positions` are the temporal positions of the images of a one-frame sample, its own
    last. `last` is true if the clip's last frame is given in addition to the first. `camera` is the direction and speed
    of a camera path without a file, and `motion_bucket` the speed given to a motion controller.
    """

    model: Fingerprint
    dtype: str
    source: Fingerprint | None = None
    start: int = 0
    frames: tuple[int, ...] = ()
    size: tuple[int, int] = (0, 0)
    extras: Mapping[str, Fingerprint] = dataclasses.field(default_factory=dict)
    positions: tuple[int, ...] = ()
    last: bool = False
    camera: str = ""
    motion_bucket: int | None = None


def places_in_time(config: DatasetConfig) -> tuple[int, ...]:
    """Return `Recipe.positions` of a dataset's samples."""
    one_frame = config.one_frame
    return () if one_frame is None else (*one_frame.controls, one_frame.target)


def gives_last(config: DatasetConfig) -> bool:
    """Return `Recipe.last` of a dataset's samples."""
    return config.images is not None and config.images.last


def names_camera(item: Item) -> str:
    """Return `Recipe.camera` of an item."""
    control, camera = item.config.control, item.camera
    if control is None or not control.camera or camera is None or camera.path:
        return ""
    return f"{camera.direction} {camera.speed!r}"


def write_recipe(recipe: Recipe) -> str:
    """Return the recipe as one metadata value."""
    return json.dumps({"version": _VERSION, **dataclasses.asdict(recipe)}, separators=(",", ":"))


def read_recipe(text: str) -> Recipe | None:
    """Return the recipe in a file's metadata, or None if its version is not supported."""
    try:
        values = json.loads(text)
        if values.pop("version") != _VERSION:
            return None
        model, source = Fingerprint(**values.pop("model")), values.pop("source")
        source = Fingerprint(**source) if source else None
        frames, size = tuple(values.pop("frames")), tuple(values.pop("size"))
        positions = tuple(values.pop("positions", ()))
        extras = {kind: Fingerprint(**extra) for kind, extra in values.pop("extras").items()}
        return Recipe(
            model=model, source=source, frames=frames, size=size, extras=extras, positions=positions, **values
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def take_fingerprint(path: Path, manifest: Manifest, reading: str = "") -> Fingerprint:
    """Return the fingerprint of a file, of a set of shards or of a folder's files; known hashes are not recomputed.

    Raises OSError or InputError if the path does not exist.
    """
    size, mtime_ns = _state(path)
    return Fingerprint(path.name, size, mtime_ns, _digest(path, manifest), reading)


def is_same(known: Fingerprint, path: Path, manifest: Manifest) -> bool:
    """Return whether a path still has the same contents; False if it does not exist."""
    try:
        size, mtime_ns = _state(path)
        if size != known.size:
            return False
        return mtime_ns == known.mtime_ns or _digest(path, manifest) == known.sha256
    except OSError:
        return False


def _state(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the modification time in nanoseconds."""
    found = [file.stat() for file in _files_of(path)]
    return sum(status.st_size for status in found), max((status.st_mtime_ns for status in found), default=0)


def _digest(path: Path, manifest: Manifest) -> str:
    files = _files_of(path)
    digests = [manifest.recall("sha256", file, file_hash) for file in files]
    if files == [path]:
        return str(digests[0])
    named = "\n".join(f"{digest} {file.name}" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256(named.encode(errors="surrogateescape")).hexdigest()


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return expand(path) if path.name.endswith((".safetensors", INDEX)) else [path]
