"""What a row is: a name, an estimate of its time, and a function that measures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]  # what was measured, by name: numbers and short texts


@dataclass(frozen=True)
class Options:
    """What the user asked for: the device, tiny sizes or true ones, the number of blocks (None: as many as fit), and
    prefixes of the rows to measure, all if empty."""

    device: str
    small: bool = False
    blocks: int | None = None
    only: tuple[str, ...] = ()


class NotHere(Exception):
    """A row cannot be measured on this machine; the text says why."""


@dataclass(frozen=True)
class Measured:
    """The values of a row, and what is wrong with them; "" if they are within their limits."""

    values: Values
    wrong: str = ""


@dataclass(frozen=True)
class Row:
    """One measurement. `seconds` is its estimate on a GPU, and `measure` gets the values of earlier rows by name."""

    name: str
    seconds: float
    measure: Callable[[Mapping[str, Values]], Measured]


def beyond(errors: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """Return which errors are above their limits, in words; "" if none is. NaN is above every limit."""
    return "; ".join(
        f"{name} {value:.2g} is above {limits[name]:g}" for name, value in errors.items() if not value <= limits[name]
    )
