"""What media files say of themselves, read once for each state of a file; and which were found broken."""

import dataclasses
from pathlib import Path
from typing import Any

from dataset.manifest import Manifest
from dataset.media import MediaInfo, probe
from wan_train.cli import InputError

# Facts of a `MediaInfo` with other fields are not read as these.
_PROBED = f"media {' '.join(field.name for field in dataclasses.fields(MediaInfo))}"
_BROKEN = "broken"


def recall_header(
    path: Path, manifest: Manifest, *, with_times: bool = False, skip_broken: bool = False
) -> MediaInfo | None:
    """What `probe` says of a file.

    Raises InputError where it cannot be read; with `skip_broken` that is None, and so is a file noted as broken.
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
            f"{path} cannot be read ({problem.strerror}): replace it or take it out of its folder"
        ) from None


def note_broken(manifest: Manifest, path: Path, problem: InputError) -> None:
    """Remember that a file cannot be decoded, until it changes."""
    manifest.note(_BROKEN, path, str(problem))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
