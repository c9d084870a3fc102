"""How weights travel from CPU RAM to a device, and back.

A lane has two queues that run side by side, one that computes and one that copies. Python only fills them; marks set
them in order against each other.
"""

import contextlib
import mmap
import os
import sys
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from wan_train.log import get_logger

Mark: TypeAlias = Any  # a point in a queue; it means something to the lane that made it
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device

log = get_logger(__name__)


class Lane(Protocol):
    """All memory is flat uint8."""

    device: torch.device

    def host(self, num_bytes: int) -> Tensor:
        """CPU RAM of exactly this size from which the device can copy."""
        ...

    def slot(self, num_bytes: int) -> Tensor:
        """Memory on the device."""
        ...

    def mark(self) -> Mark:
        """The point that the computing queue has been filled up to."""
        ...

    def upload(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Queue a copy of all of `master` to the start of `slot` behind `after`; gives the point where it is done.

        Copies are made in the order of the calls. The way back is the same with `slot` in CPU RAM.
        """
        ...

    def wait(self, mark: Mark) -> None:
        """Let all that is put into the computing queue from now on run behind `mark`."""
        ...

    def finish(self) -> None:
        """Wait, here, until all copies are done: what came to CPU RAM can be read."""
        ...


class HostLane:
    """For a device that computes in CPU RAM, or that has one queue only: a copy is done when it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def slot(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> Mark:
        return None

    def upload(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        target[: len(source)].copy_(source)

    def wait(self, mark: Mark) -> None:
        pass

    def finish(self) -> None:
        pass


class AcceleratorLane:
    """The device's current stream computes and a stream of the lane's own copies; marks are events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runtime: Any = torch.get_device_module(device)
        self._copies = self._runtime.Stream(device=device)
        self._warned = False

    def host(self, num_bytes: int) -> Tensor:
        memory = _pinned(num_bytes, self.device)
        if memory is not None:
            return memory
        if not self._warned:  # once: there may be a buffer for each of a thousand tensors
            log.warning("cannot pin more memory: further buffers are pageable, so that transfers are slower")
            self._warned = True
        return torch.empty(num_bytes, dtype=torch.uint8)

    def slot(self, num_bytes: int) -> Tensor:
        slot = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        # For the day when it is given up: a last copy may be on its way then, and the allocator must not hand the
        # memory on before that has landed.
        slot.record_stream(self._copies)
        return slot

    def mark(self) -> Mark:
        return self._runtime.current_stream(self.device).record_event()

    def upload(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        self._copies.wait_event(after)
        with self._runtime.stream(self._copies):
            target[: len(source)].copy_(source, non_blocking=True)
        return self._copies.record_event()

    def wait(self, mark: Mark) -> None:
        self._runtime.current_stream(self.device).wait_event(mark)

    def finish(self) -> None:
        self._copies.synchronize()


def make_lane(device: torch.device) -> Lane:
    """The lane to a device."""
    has_streams = device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")
    return AcceleratorLane(device) if has_streams else HostLane(device)


def lane_from_host(device: torch.device) -> Lane | None:
    """The lane to a device; None where there is nothing to move, since it computes in CPU RAM."""
    return None if device.type == "cpu" else make_lane(device)


class _Locked(mmap.mmap):
    """Pages of memory that CUDA has locked in place.

    torch's own pinned memory comes in powers of two, up to twice of what was asked for. A mapping is exact, begins
    with a page, and is shared with forked workers, which would otherwise get a copy of every locked page.
    """

    address = 0
    process = 0
    device: torch.device

    def lock(self, device: torch.device) -> Tensor | None:
        """The memory, for copies to `device`, as a tensor that keeps it alive; None if not so much can be locked."""
        memory = torch.frombuffer(self, dtype=torch.uint8)
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), _PORTABLE)):
            return None
        self.address, self.process, self.device = memory.data_ptr(), os.getpid(), device
        return memory

    def __del__(self) -> None:
        if self.process == os.getpid() and not sys.is_finalizing():  # a forked worker has no say
            torch.cuda.synchronize(self.device)  # a copy may still read it
            torch.cuda.cudart().cudaHostUnregister(self.address)


def _pinned(num_bytes: int, device: torch.device) -> Tensor | None:
    """Pinned CPU RAM, for asynchronous copies; None where it is refused."""
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
    """CUDA reports a refusal once more at the next kernel, whosoever that is: be that one."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)
