"""State carried from one step of a run to the next, and the length of a run."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Length:
    """Length of a run in optimizer steps and epochs; the last epoch may be incomplete."""

    steps: int
    epochs: int


class Stateful(Protocol):
    """Something that carries state from one step to the next."""

    def state_dict(self) -> Any:
        """Return the state as tensors, numbers and text in dicts and lists."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore the state."""
        ...


@dataclass
class Skipped:
    """Number of steps skipped because their loss or gradient was NaN or Inf."""

    count: int = 0

    def state_dict(self) -> dict[str, int]:
        """Return the count."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the count."""
        self.count = state["count"]


class RunningMean:
    """Mean of the last `window` values."""

    def __init__(self, window: int = 100) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float:
        """Add a value and return the mean."""
        self._values.append(value)
        return self.mean

    @property
    def mean(self) -> float:
        """The mean; NaN before the first value."""
        return sum(self._values) / len(self._values) if self._values else math.nan

    def state_dict(self) -> dict[str, list[float]]:
        """Return the values."""
        return {"values": list(self._values)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore saved values."""
        self._values.clear()
        self._values.extend(state["values"])
