"""What blocks keep for the backward pass, moved to CPU RAM until then.

A call of a block keeps a few tensors. Their copies out start as soon as each is kept and run beside the block's
products; the device's own are given up when the next block starts. On the way back each block's turn starts the copies
of the block before it, so that at most two blocks have theirs on the device. Python waits for none of it: the device's
own queues do.
"""

import weakref
from bisect import bisect_left, insort
from typing import Protocol

import torch
from torch import Tensor

from wan_train.placement.lanes import Lane


class HostMemory(Protocol):
    """Where copies get their host buffers from."""

    lane: Lane

    def take(self, num_bytes: int) -> Tensor:
        """A buffer of at least this size."""
        ...

    def give(self, memory: Tensor) -> None:
        """A buffer that was taken, given back."""
        ...


class Store:
    """CPU RAM for copies, used again and again: pinning is slow."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._free: list[Tensor] = []  # shortest first

    def take(self, num_bytes: int) -> Tensor:
        """Memory of at least this size; what was too short makes room for what is made."""
        fitting = bisect_left(self._free, num_bytes, key=len)
        if fitting < len(self._free):
            return self._free.pop(fitting)
        if self._free:
            self._free.pop()
        return self.lane.host(num_bytes)

    def give(self, memory: Tensor) -> None:
        """Memory that is needed no more; a copy may be on its way still, since the next one waits in the same queue."""
        insort(self._free, memory, key=len)


class Kept:
    """A tensor that is on the device, in CPU RAM, or on its way."""

    def __init__(self, store: HostMemory, tensor: Tensor) -> None:
        near = without_gaps(tensor.detach())  # without its graph, which may hold this in turn
        self._shape, self._stride, self._dtype = near.shape, near.stride(), near.dtype
        flat = as_bytes(near)
        self._store, self._lane = store, store.lane
        self._near: Tensor | None = near
        self._far = store.take(len(flat))
        self._pinned = self._far[: len(flat)]
        self._done = self._lane.upload(self._pinned, flat, self._lane.mark())
        # In CPU RAM, whole once its copy is done; what it lies in is used again when this is gone.
        self.far = self._pinned.view(self._dtype).as_strided(self._shape, self._stride)

    def leave(self) -> None:
        """Give up the device's memory. Whoever gets it next comes behind the copy that uses it still."""
        if self._near is not None:
            self._lane.wait(self._done)
            self._near = None

    def fetch(self) -> None:
        """Start towards the device."""
        if self._near is None:
            # Of the computing queue's memory, so that it is given up there as well, and no queue has to tell another.
            self._near = torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device=self._lane.device)
            self._done = self._lane.upload(as_bytes(self._near), self._pinned, self._lane.mark())

    def take(self) -> Tensor:
        """The tensor on the device, where it is not kept any longer."""
        self.fetch()
        near = self._near
        assert near is not None
        self.leave()
        return near

    def __del__(self) -> None:
        if hasattr(self, "_done"):
            self.leave()
            self._store.give(self._far)


class Call:
    """What one call of a block keeps."""

    def __init__(self, store: Store, before: "Call | None") -> None:
        self._store = store
        self._before = weakref.ref(before) if before else None
        self._kept: list[Kept] = []
        self._fetched = False

    def keep(self, tensor: Tensor) -> Kept:
        """Start a tensor on its way out. It must not change any more."""
        kept = Kept(self._store, tensor)
        self._kept.append(kept)
        return kept

    def take(self, kept: Kept) -> Tensor:
        """The tensor again; what else this call and the one before it keep starts towards the device."""
        self._fetch()
        if before := self._before and self._before():
            before._fetch()
        return kept.take()

    def leave(self) -> None:
        """Give up the device's memory."""
        for kept in self._kept:
            kept.leave()

    def _fetch(self) -> None:
        if not self._fetched:
            self._fetched = True
            for kept in self._kept:
                kept.fetch()


class Offload:
    """The calls of all blocks, in their order; a call lives as long as the graph that needs what it keeps."""

    def __init__(self, lane: Lane) -> None:
        self._store = Store(lane)
        self._latest: weakref.ref[Call] | None = None

    def begin(self) -> Call:
        """The next block starts: what the last one kept may leave the device."""
        before = self._latest() if self._latest else None
        if before:
            before.leave()
        call = Call(self._store, before)
        self._latest = weakref.ref(call)
        return call


def without_gaps(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that has gaps, or overlaps, in memory."""
    if torch.empty_like(tensor, device="meta").stride() == tensor.stride():
        return tensor
    return torch.empty_like(tensor).copy_(tensor)


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor without gaps, as it lies there, uint8."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
