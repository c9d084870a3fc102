"""Offload tensors that blocks save for the backward pass to CPU RAM until they are needed.

Each copy to the host starts as soon as the tensor is saved and overlaps with the block's computation; device memory is
freed when the next block starts. In the backward pass each block prefetches the tensors of the block before it, so that
at most two blocks have theirs on the device. Python does not wait: the device's streams synchronize by events.
"""

import weakref
from bisect import bisect_left, insort
from typing import Protocol

import torch
from torch import Tensor

from wan_train.placement.lanes import Lane


class HostMemory(Protocol):
    """Allocator of host buffers for offloaded tensors."""

    lane: Lane

    def take(self, num_bytes: int) -> Tensor:
        """Return a buffer of at least this size."""
        ...

    def give(self, memory: Tensor) -> None:
        """Return a buffer to the allocator."""
        ...


class Store:
    """Pool of host buffers, which are reused because pinning is slow."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._free: list[Tensor] = []  # smallest first

    def take(self, num_bytes: int) -> Tensor:
        """Return a buffer of at least this size; if all are too small, the largest is freed and a new one allocated."""
        fitting = bisect_left(self._free, num_bytes, key=len)
        if fitting < len(self._free):
            return self._free.pop(fitting)
        if self._free:
            self._free.pop()
        return self.lane.host(num_bytes)

    def give(self, memory: Tensor) -> None:
        """Return a buffer to the pool. A copy may still use it: the compute stream waits for it before the next one."""
        insort(self._free, memory, key=len)


class Kept:
    """A tensor on the device, in CPU RAM, or in transfer."""

    def __init__(self, store: HostMemory, tensor: Tensor) -> None:
        near = without_gaps(tensor.detach())  # without its graph, which may hold a reference to this object
        self._shape, self._stride, self._dtype = near.shape, near.stride(), near.dtype
        flat = as_bytes(near)
        self._store, self._lane = store, store.lane
        self._near: Tensor | None = near
        self._far = store.take(len(flat))
        self._pinned = self._far[: len(flat)]
        self._done = self._lane.download(self._pinned, flat, self._lane.mark())
        # In CPU RAM, complete after its copy; the buffer is reused once this object is freed.
        self.far = self._pinned.view(self._dtype).as_strided(self._shape, self._stride)

    def leave(self) -> None:
        """Free the device memory after the copy that reads it."""
        if self._near is not None:
            self._lane.wait(self._done)
            self._near = None

    def fetch(self) -> None:
        """Start the copy to the device."""
        if self._near is None:
            # Allocated on the compute stream, so that it is freed there without synchronizing streams.
            self._near = torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device=self._lane.device)
            self._done = self._lane.upload(as_bytes(self._near), self._pinned, self._lane.mark())

    def take(self) -> Tensor:
        """Return the tensor on the device and release it here."""
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
    """Tensors saved by one call of a block."""

    def __init__(self, store: Store, before: "Call | None") -> None:
        self._store = store
        self._before = weakref.ref(before) if before else None
        self._kept: list[Kept] = []
        self._fetched = False

    def keep(self, tensor: Tensor) -> Kept:
        """Start offloading a tensor, which must not change any more."""
        kept = Kept(self._store, tensor)
        self._kept.append(kept)
        return kept

    def take(self, kept: Kept) -> Tensor:
        """Return the tensor on the device; prefetches all other tensors of this call and of the previous one."""
        self._fetch()
        if before := self._before and self._before():
            before._fetch()
        return kept.take()

    def leave(self) -> None:
        """Free the device memory of all saved tensors."""
        for kept in self._kept:
            kept.leave()

    def _fetch(self) -> None:
        if not self._fetched:
            self._fetched = True
            for kept in self._kept:
                kept.fetch()


class Offload:
    """The calls of all blocks, in order; a call lives as long as the graph that needs its tensors."""

    def __init__(self, lane: Lane) -> None:
        self._store = Store(lane)
        self._latest: weakref.ref[Call] | None = None

    def begin(self) -> Call:
        """Start the next block and free the device memory of the previous one."""
        before = self._latest() if self._latest else None
        if before:
            before.leave()
        call = Call(self._store, before)
        self._latest = weakref.ref(call)
        return call


def without_gaps(tensor: Tensor) -> Tensor:
    """Return the tensor, or a dense copy if it has gaps or overlaps in memory."""
    if torch.empty_like(tensor, device="meta").stride() == tensor.stride():
        return tensor
    return torch.empty_like(tensor).copy_(tensor)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a dense tensor as flat uint8, in storage order."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
