"""What carries over from one step of a run to the next, and how long a run is."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Length:
    """How long a run is: optimizer steps and epochs, the last one perhaps in part."""

    steps: int
    epochs: int


class Stateful(Protocol):
    """What carries something from one step to the next."""

    def state_dict(self) -> Any:
        """Tensors, numbers and text in dicts and lists."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Resume from there."""
        ...


@dataclass
class Skipped:
    """Number of steps that were left out because their loss or gradient was NaN or Inf."""

    count: int = 0

    def state_dict(self) -> dict[str, int]:
        """The count."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume counting."""
        self.count = state["count"]


class RunningMean:
    """Mean of the last `window` values."""

    def __init__(self, window: int = 100) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float:
        """Take in a value and return the mean."""
        self._values.append(value)
        return self.mean

    @property
    def mean(self) -> float:
        """The mean; NaN before the first value."""
        return sum(self._values) / len(self._values) if self._values else math.nan

    def state_dict(self) -> dict[str, list[float]]:
        """The values."""
        return {"values": list(self._values)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Resume from saved values."""
        self._values.clear()
        self._values.extend(state["values"])
