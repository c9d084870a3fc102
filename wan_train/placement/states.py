"""States of an optimizer in CPU RAM: those of one weight come to the device for its step.

The way back runs beside the next weight's step, and what that needs is fetched ahead: weights are stepped in the order
of the last step, unless it is another model. Up to three weights have their states on the device at a time.

Each state has a host buffer of its own, of exactly its size, from its first step on: it is fetched from there and goes
back to there. The lane makes copies in the order in which they are asked for, so neither of two such copies begins
before the other has ended.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from wan_train.placement.lanes import Lane
from wan_train.placement.offload import Kept


class _HostBuffer:
    """The host buffer of one state. It is made anew only when the state has another size."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._buffer: Tensor | None = None

    def take(self, num_bytes: int) -> Tensor:
        """The buffer, of exactly this size."""
        buffer, self._buffer = self._buffer, None
        if buffer is None or len(buffer) != num_bytes:
            del buffer  # before there is another one
            buffer = self.lane.host(num_bytes)
        return buffer

    def give(self, memory: Tensor) -> None:
        """The buffer again; a copy from it may be on its way still, since the next one waits in the same queue."""
        self._buffer = memory


class HostStates:
    """The states of one optimizer. Between two steps, and once they `settle`, they are tensors in CPU RAM, each with a
    storage of its own."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._buffers: dict[Hashable, dict[str, _HostBuffer]] = {}
        self._kept: dict[Hashable, dict[str, Kept]] = {}
        self._next: dict[Hashable, Hashable] = {}
        self._last: Hashable = None
        self._leaving: list[Kept] = []
        self._coming: list[Kept] = []

    @contextmanager
    def at_hand(self, owner: Hashable, state: dict[str, Any]) -> Iterator[None]:
        """While it lasts the tensors of the `owner`'s state are on the device; new ones may come."""
        self._next[self._last], self._last = owner, owner
        kept = self._kept.pop(owner, {})
        for name, value in state.items():
            if _is_large(value):
                # Another tensor than was left here has been put in its place: loaded from a file, for instance.
                ours = name in kept and kept[name].far is value
                state[name] = kept[name].take() if ours else value.to(self._lane.device)
        kept.clear()  # all host buffers are given back before they are taken for the way there
        self._give_up_coming()  # what was fetched for a weight that was not the next one after all
        self._coming = list(self._kept.get(self._next.get(owner), {}).values())
        for coming in self._coming:
            coming.fetch()
        yield
        self._leave()
        buffers = self._buffers.get(owner, {})
        large = {name: value for name, value in state.items() if _is_large(value)}
        buffers = self._buffers[owner] = {name: buffers.get(name) or _HostBuffer(self._lane) for name in large}
        leaving = {name: Kept(buffers[name], value) for name, value in large.items()}
        for name, one in leaving.items():
            state[name] = one.far
        self._kept[owner], self._leaving = leaving, list(leaving.values())

    def rest(self) -> None:
        """Let nothing of them be on the device. Python does not wait: the device's own queues do."""
        self._leave()
        self._give_up_coming()
        self._last = None

    def settle(self) -> None:
        """The same, and wait until all are in CPU RAM, whole: they may be read and written there."""
        self.rest()
        self._lane.finish()

    def _leave(self) -> None:
        for kept in self._leaving:
            kept.leave()
        self._leaving = []

    def _give_up_coming(self) -> None:
        for coming in self._coming:
            coming.leave()
        self._coming = []


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1
