"""States of an optimizer in main memory: those of one weight come to the device for its step.

The way back runs beside the next weight's step, and what that needs is fetched ahead: weights are stepped in the order
of the last step, unless it is another model. Up to three weights have their states on the device at a time.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from wan_train.memory.lanes import Lane
from wan_train.memory.offload import Kept, Store


class HostStates:
    """The states of one optimizer. Between two steps, and once they `settle`, they are tensors in main memory."""

    def __init__(self, lane: Lane) -> None:
        self._lane, self._store = lane, Store(lane)
        self._kept: dict[Hashable, dict[str, Kept]] = {}
        self._next: dict[Hashable, Hashable] = {}
        self._last: Hashable = None
        self._leaving: list[Kept] = []

    @contextmanager
    def at_hand(self, owner: Hashable, state: dict[str, Any]) -> Iterator[None]:
        """While it lasts the tensors of the `owner`'s state are on the device; new ones may come."""
        self._next[self._last], self._last = owner, owner
        kept = self._kept.pop(owner, {})
        for name, value in state.items():
            if _is_large(value):
                state[name] = kept[name].take() if name in kept else value.to(self._lane.device)
        for coming in self._kept.get(self._next.get(owner), {}).values():
            coming.fetch()
        yield
        self._leave()
        leaving = {name: Kept(self._store, value) for name, value in state.items() if _is_large(value)}
        for name, one in leaving.items():
            state[name] = one.far
        self._kept[owner], self._leaving = leaving, list(leaving.values())

    def settle(self) -> None:
        """Wait until all are in main memory, whole."""
        self._leave()
        self._last = None
        self._lane.finish()

    def _leave(self) -> None:
        for kept in self._leaving:
            kept.leave()
        self._leaving = []


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1
