"""Parse the text of a prompt line or table into the value of an option; ValueError says what it must be."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from wan_train.cli import Option, value_type

Read = Callable[[str], Any]

NUM_CAMERA_NUMBERS = 19  # per line of RealEstate10K: time stamp, four intrinsics, two zeros, a 3x4 matrix


def make_reader(hint: Any, described: Option, *, maximum: float | None = None) -> Read:
    """Return the parser of an option with this annotation, range and choices; `maximum` applies if they have none.

    Switches accept true, false or an empty text (on). Several texts are on a line each, several numbers are separated
    by commas or blanks.
    """
    kind, count = value_type(hint)
    if described.choices:
        return _one_of(described.choices)
    if kind is bool:
        return _read_switch
    if kind is str:
        return str if count is None else _read_lines
    number = _number(kind, described.minimum, maximum if described.maximum is None else described.maximum)
    return number if count is None else _several(number, count, (described.metavar or "").lower().split())


def read_numbers(text: str) -> tuple[float, ...]:
    """Parse comma-separated numbers; raises ValueError for other text."""
    return tuple(float(part) for part in text.replace(",", " ").split())


def read_layers(text: str) -> tuple[int, ...]:
    """Parse comma-separated block indices such as 9,10; raises ValueError for other text."""
    layers = tuple(sorted({int(part) for part in text.replace(",", " ").split()}))
    if any(layer < 0 for layer in layers):
        raise ValueError("must be block indices from 0, such as 9,10")
    return layers


def read_pad(text: str) -> tuple[int, ...]:
    """Parse (left, top, right, bottom) in pixels, or one number for all four; raises ValueError for other text."""
    parts = text.replace(",", " ").split()
    sides = tuple(map(int, filter(str.isdecimal, parts)))
    if len(sides) not in (1, 4) or len(sides) != len(parts):
        raise ValueError("must be LEFT,TOP,RIGHT,BOTTOM in pixels, or one number for all sides, each 0 or more")
    return sides * 4 if len(sides) == 1 else sides


def read_camera(text: str) -> tuple[float, ...]:
    """Parse a line of RealEstate10K, 19 finite numbers; raises ValueError for other text."""
    message = f"must be {NUM_CAMERA_NUMBERS} numbers, a camera in RealEstate10K format"
    try:
        numbers = read_numbers(text)
    except ValueError:
        raise ValueError(message) from None
    if len(numbers) != NUM_CAMERA_NUMBERS or not all(map(math.isfinite, numbers)):
        raise ValueError(message)
    return numbers


def _number(value_kind: type, low: float | None, high: float | None) -> Read:
    def read(text: str) -> Any:
        value = value_kind(text)
        # False for NaN, regardless of the bounds.
        if not (-math.inf if low is None else low) <= value <= (math.inf if high is None else high):
            raise ValueError(f"must be {_range(value_kind, low, high)}")
        return value

    return read


def _range(value_kind: type, low: float | None, high: float | None) -> str:
    """Return the bounds in words; integers in full, because seeds have 19 digits."""
    first, last = (str(bound) if value_kind is int else f"{bound:g}" for bound in (low or 0, high or 0))
    if low is None:
        return "a number" if high is None else f"at most {last}"
    return f"{first} or more" if high is None else f"from {first} to {last}"


def _several(number: Read, count: int | str, names: Sequence[str]) -> Read:
    def read(text: str) -> tuple[Any, ...]:
        values = tuple(map(number, text.replace(",", " ").split()))
        if isinstance(count, int) and len(values) != count:
            raise ValueError(f"must be {' and '.join(names) or f'{count} numbers'}")
        return values

    return read


def _one_of(names: Sequence[str]) -> Read:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text

    return read


def _read_lines(text: str) -> tuple[str, ...]:
    return tuple(text.splitlines())


def _read_switch(text: str) -> bool:
    """Parse a switch: on without a value, or true or false as in tables."""
    if text.lower() not in ("", "true", "false"):
        raise ValueError("must be true or false, or have no value")
    return text.lower() != "false"
