"""The columns of a listing other than the caption: controls, references, masks, camera path and speed.

Our own column names are read for every task; those of DiffSynth-Studio's `metadata.csv` if the task uses them.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.config import DatasetConfig
from dataset.config_conditions import CAMERA, CONTROL, REFERENCES, VACE_MASK, refuse_idle
from dataset.config_keys import read_direction, read_motion_bucket, read_speed
from dataset.items import CameraSource
from wan_train.errors import InputError
from wan_train.models.variants import ControlInputs


@dataclass(frozen=True)
class Columns:
    """The values of one line; a camera's direction and speed may each default to the dataset's."""

    controls: tuple[Path, ...] = ()
    references: tuple[Path, ...] = ()
    vace_mask: Path | None = None
    camera_path: Path | None = None
    camera_direction: str = ""
    camera_speed: float | None = None
    motion_bucket_id: int | None = None

    def camera(self, direction: str, speed: float) -> CameraSource | None:
        """Return the camera path of the line, with the dataset's direction and speed as defaults."""
        if self.camera_path is not None:
            return CameraSource(self.camera_path)
        chosen = self.camera_direction or direction
        return CameraSource(None, chosen, speed if self.camera_speed is None else self.camera_speed) if chosen else None


# Our columns; the first two may be repeated, with _0, _1 and so on appended to their names.
_CONTROL, _REFERENCE, _VACE_MASK, _MOTION = "control_path", "reference_path", "vace_mask_path", "motion_bucket_id"
_CAMERA, _DIRECTION, _SPEED = "camera_path", "camera_direction", "camera_speed"
_OURS = (_CONTROL, _REFERENCE, _VACE_MASK, _CAMERA, _DIRECTION, _SPEED, _MOTION)
_NUMBERED = re.compile(rf"({_CONTROL}|{_REFERENCE})_\d+")
_GIVEN = {
    _CONTROL: CONTROL,
    _REFERENCE: REFERENCES,
    _VACE_MASK: VACE_MASK,
    **dict.fromkeys((_CAMERA, _DIRECTION, _SPEED), CAMERA),
}


# DiffSynth-Studio's columns and our names for them, by the inputs of a task.
_OF_VIDEO, _OF_REFERENCE = {"control_video": _CONTROL}, {"reference_image": _REFERENCE}
_OF_VACE = {"vace_video": _CONTROL, "vace_video_mask": _VACE_MASK, "vace_reference_image": _REFERENCE}
_OF_CAMERA = {"camera_control_direction": _DIRECTION, "camera_control_speed": _SPEED}
OF_SOME_TASKS = frozenset({**_OF_VIDEO, **_OF_REFERENCE, **_OF_VACE, **_OF_CAMERA})


def _foreign_names(control: ControlInputs | None) -> dict[str, str]:
    """Return DiffSynth-Studio's columns that a task reads, each with our name for it."""
    if control is None:
        return {}
    names: dict[str, str] = {}
    for is_read, columns in (
        (control.video, _OF_VIDEO),
        (control.reference, _OF_REFERENCE),
        (control.vace, _OF_VACE),
        (control.camera, _OF_CAMERA),
    ):
        names |= columns if is_read else {}
    return names


def _our_names(names: Iterable[str], control: ControlInputs | None) -> dict[str, str]:
    """Return the columns that are read, in order of their numbers, each with our name for it."""
    ours = {name: name for name in _OURS} | _foreign_names(control)
    ordered = sorted(names, key=lambda name: (len(name), name))
    found = {name: matched[1] if (matched := _NUMBERED.fullmatch(name)) else ours.get(name, "") for name in ordered}
    return {name: column for name, column in found.items() if column}


def read_names(names: Collection[str], control: ControlInputs | None) -> set[str]:
    """Return the names that are read for a model with `control`; None: task unknown."""
    return set(_our_names(names, control))


def read_columns(cells: Mapping[str, Any], config: DatasetConfig, location: str) -> Columns:
    """Return the values in the cells of a line; None in a cell means no value.

    Relative paths start at the working directory, or at the folder of a CSV file. Raises InputError, prefixed with
    `location`, for missing files, invalid values, two columns for the same value, and our own columns that the task
    does not read.
    """
    given: dict[str, dict[str, Any]] = {}
    for name, column in _our_names(cells, config.control).items():
        if cells[name] is None:
            continue
        if column in _GIVEN and config.one_frame is None:
            refuse_idle(name, _GIVEN[column], config.control, location)
        given.setdefault(column, {})[name] = cells[name]
    _refuse_doubles(given, location)
    paths = {
        column: tuple(_read_path(config, location, *cell) for cell in given.get(column, {}).items())
        for column in _PATHS
    }
    values = {
        column: _read_value(read, location, *cell)
        for column, read in _VALUES.items()
        for cell in given.get(column, {}).items()
    }
    columns = Columns(
        controls=paths[_CONTROL],
        references=paths[_REFERENCE],
        vace_mask=next(iter(paths[_VACE_MASK]), None),
        camera_path=next(iter(paths[_CAMERA]), None),
        **values,
    )
    if columns.camera_path and (columns.camera_direction or columns.camera_speed is not None):
        raise InputError(f"{location}: sets a camera path both by file and by direction or speed: use one of them")
    if columns.camera_speed is not None and not (columns.camera_direction or config.camera_direction):
        raise InputError(f"{location}: sets a camera's speed without its direction: add {_DIRECTION}")
    return columns


_PATHS = (_CONTROL, _REFERENCE, _VACE_MASK, _CAMERA)
# Columns with values, stored under the same names in `Columns`.
_VALUES: dict[str, Callable[[Any], Any]] = {
    _DIRECTION: read_direction,
    _SPEED: lambda cell: read_speed(_number(cell)),
    _MOTION: lambda cell: read_motion_bucket(_number(cell)),
}


def _refuse_doubles(given: Mapping[str, Mapping[str, Any]], location: str) -> None:
    for column, cells in given.items():
        families = {_NUMBERED.sub(r"\1", name): name for name in cells}
        if len(families) > 1:
            raise InputError(f"{location}: {' and '.join(families)} both set the {column}: leave one of them empty")


def _read_path(config: DatasetConfig, location: str, name: str, given: Any) -> Path:
    is_table = config.listing is not None and config.listing.suffix.lower() == ".csv"
    start = config.directory if is_table else Path()
    path = start / Path(given).expanduser() if isinstance(given, str) and given else None
    if path is None or not path.exists():
        raise InputError(f"{location}: {name} {given!r}: no such file (relative paths start at {start.absolute()})")
    return path


def _read_value(read: Callable[[Any], Any], location: str, name: str, given: Any) -> Any:
    try:
        return read(given)
    except ValueError as problem:
        raise InputError(f"{location}: {name} {given!r}: expected {problem}") from None


def _number(cell: Any) -> Any:
    """Return a table cell as a number, an int if it is whole; other cells unchanged."""
    try:
        value = float(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell
    return int(value) if isinstance(value, float) and value.is_integer() else value
