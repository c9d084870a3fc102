"""What carries over from one step of a run to the next, and how long a run is."""

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
        """Go on from there."""
        ...


@dataclass
class Skipped:
    """Number of steps that were left out because their loss or gradient was NaN or Inf."""

    count: int = 0

    def state_dict(self) -> dict[str, int]:
        """The count."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.count = state["count"]
