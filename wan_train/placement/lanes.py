"""Copies of weights between CPU RAM and a device.

A lane has three queues that run concurrently: the compute stream and a transfer stream for each direction, because a
device copies in both directions at once. Python only fills them; marks (CUDA events) order them.
"""

import contextlib
import mmap
import os
import sys
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from wan_train.log import get_logger

Mark: TypeAlias = Any  # a point in a stream (an event), valid only for the lane that made it
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device

log = get_logger(__name__)


class Lane(Protocol):
    """The streams and memory for transfers to one device. All memory is flat uint8."""

    device: torch.device

    def host(self, num_bytes: int) -> Tensor:
        """Allocate CPU RAM of exactly this size that the device can copy from; pinned if possible."""
        ...

    def slot(self, num_bytes: int) -> Tensor:
        """Allocate memory on the device."""
        ...

    def mark(self) -> Mark:
        """Return an event at the current end of the compute stream."""
        ...

    def upload(self, target: Tensor, source: Tensor, *after: Mark) -> Mark:
        """Queue a copy of all of `source`, in CPU RAM, to the start of `target`, on the device, after the events
        `after`; return the event of its end.

        Uploads run in the order of the calls, but not in order with downloads.
        """
        ...

    def download(self, target: Tensor, source: Tensor, *after: Mark) -> Mark:
        """Do the same as `upload` with `source` on the device and `target` in CPU RAM."""
        ...

    def wait(self, mark: Mark) -> None:
        """Make all work queued in the compute stream from now on wait for `mark`."""
        ...

    def finish(self) -> None:
        """Block until all copies are done, so that their targets in CPU RAM can be read."""
        ...


class HostLane:
    """Synchronous copies, for a device that computes in CPU RAM or has a single stream only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def slot(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> Mark:
        return None

    def upload(self, target: Tensor, source: Tensor, *after: Mark) -> Mark:
        target[: len(source)].copy_(source)

    def download(self, target: Tensor, source: Tensor, *after: Mark) -> Mark:
        target[: len(source)].copy_(source)

    def wait(self, mark: Mark) -> None:
        pass

    def finish(self) -> None:
        pass


class AcceleratorLane:
    """Copies on two transfer streams, one for each direction, beside the device's current stream; marks are events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runtime: Any = torch.get_device_module(device)
        self._uploads = self._runtime.Stream(device=device)
        self._downloads = self._runtime.Stream(device=device)
        self._warned = False

    def host(self, num_bytes: int) -> Tensor:
        memory = _pinned(num_bytes, self.device)
        if memory is not None:
            return memory
        if not self._warned:  # warn once: there may be a buffer for each of a thousand tensors
            log.warning("cannot pin more memory: further buffers are pageable, so that transfers are slower")
            self._warned = True
        return torch.empty(num_bytes, dtype=torch.uint8)

    def slot(self, num_bytes: int) -> Tensor:
        slot = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        # When the slot is freed a copy may still be running, and the allocator must not reuse the memory before it
        # has finished.
        slot.record_stream(self._uploads)
        slot.record_stream(self._downloads)
        return slot

    def mark(self) -> Mark:
        return self._runtime.current_stream(self.device).record_event()

    def upload(self, target: Tensor, source: Tensor, *after: Mark) -> Mark:
        return self._copy(self._uploads, target, source, after)

    def download(self, target: Tensor, source: Tensor, *after: Mark) -> Mark:
        return self._copy(self._downloads, target, source, after)

    def _copy(self, stream: Any, target: Tensor, source: Tensor, after: tuple[Mark, ...]) -> Mark:
        for mark in after:
            stream.wait_event(mark)
        with self._runtime.stream(stream):
            target[: len(source)].copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, mark: Mark) -> None:
        self._runtime.current_stream(self.device).wait_event(mark)

    def finish(self) -> None:
        self._uploads.synchronize()
        self._downloads.synchronize()


def make_lane(device: torch.device) -> Lane:
    """Return the lane to a device."""
    has_streams = device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")
    return AcceleratorLane(device) if has_streams else HostLane(device)


def lane_from_host(device: torch.device) -> Lane | None:
    """Return the lane to a device; None for a CPU, which needs no transfers."""
    return None if device.type == "cpu" else make_lane(device)


class _Locked(mmap.mmap):
    """Memory pinned by CUDA.

    torch allocates pinned memory in powers of two, up to twice the requested size. A mapping has the exact size, is
    page-aligned, and is shared with forked workers, which would otherwise copy every pinned page.
    """

    address = 0
    process = 0
    device: torch.device

    def lock(self, device: torch.device) -> Tensor | None:
        """Pin the memory for copies to `device`; return it as a tensor that keeps it alive, or None on failure."""
        memory = torch.frombuffer(self, dtype=torch.uint8)
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), _PORTABLE)):
            return None
        self.address, self.process, self.device = memory.data_ptr(), os.getpid(), device
        return memory

    def __del__(self) -> None:
        if self.process == os.getpid() and not sys.is_finalizing():  # not in forked workers
            torch.cuda.synchronize(self.device)  # a copy may still read it
            torch.cuda.cudart().cudaHostUnregister(self.address)


def _pinned(num_bytes: int, device: torch.device) -> Tensor | None:
    """Allocate pinned CPU RAM for asynchronous copies; None if that fails."""
    if device.type == "cuda":
        memory = _Locked(-1, num_bytes).lock(device)
        if memory is not None:
            return memory
        _forget_error(device)
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return None


def _forget_error(device: torch.device) -> None:
    """Clear CUDA's sticky error of a failed pinning, which the next kernel would report, by running a kernel."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)
