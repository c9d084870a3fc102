"""Optimizer states in CPU RAM: the states of one weight are on the device during its step.

Copies back to the host overlap with the next weight's step, and the states of that weight are prefetched: weights are
expected in the order of the last step, except across models. At most three weights have their states on the device.

Each state has a host buffer of exactly its size from its first step on. It is copied from and to that buffer. The
compute stream waits for each copy, and each copy for the compute stream, so that copies from and to a buffer do not
overlap.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from wan_train.placement.lanes import Lane
from wan_train.placement.offload import Kept


class _HostBuffer:
    """The host buffer of one state; reallocated only if the state's size changes."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._buffer: Tensor | None = None

    def take(self, num_bytes: int) -> Tensor:
        """Return the buffer, of exactly this size."""
        buffer, self._buffer = self._buffer, None
        if buffer is None or len(buffer) != num_bytes:
            del buffer  # free it before allocating another
            buffer = self.lane.host(num_bytes)
        return buffer

    def give(self, memory: Tensor) -> None:
        """Return the buffer. A copy may still use it: the compute stream waits for it before the next one."""
        self._buffer = memory


class HostStates:
    """The states of one optimizer.

    Between steps, and after `settle`, they are tensors in CPU RAM, each with a storage of its own.
    """

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
        """Have the `owner`'s states on the device within the context; the step may add states."""
        self._next[self._last], self._last = owner, owner
        kept = self._kept.pop(owner, {})
        for name, value in state.items():
            if _is_large(value):
                # The state may have been replaced by another tensor, for example loaded from a file.
                ours = name in kept and kept[name].far is value
                state[name] = kept[name].take() if ours else value.to(self._lane.device)
        kept.clear()  # return all host buffers before they are taken again
        self._give_up_coming()  # prefetched for a weight that is not the next one
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
        """Free the states' device memory. Python does not wait for copies."""
        self._leave()
        self._give_up_coming()
        self._last = None

    def settle(self) -> None:
        """Free the states' device memory and wait until they are complete in CPU RAM, where they can be read and
        written."""
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
