"""Copies of a step's inputs to the device and of its results back, for which Python does not wait.

Such a copy needs pinned CPU RAM: from or to other memory it runs in order with everything queued before, while Python
waits.
"""

import time
from typing import Any

import torch
from torch import Tensor

from wan_train.placement.offload import without_gaps


def can_pin(device: torch.device) -> bool:
    """Return whether copies to and from a device use pinned memory."""
    return device.type == "cuda"


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in pinned CPU RAM for a copy to `device`: the tensor itself if it is pinned already, is not in
    CPU RAM, or need not be pinned for this device."""
    if not can_pin(device) or tensor.device.type != "cpu":
        return tensor
    dense = without_gaps(tensor)
    return dense if dense.is_pinned() else dense.pin_memory()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on a device, or the tensor if it is there. Python does not wait; do not modify the source."""
    if tensor.device == device:
        return tensor
    return pinned(tensor, device).to(device, non_blocking=can_pin(device))


class Readback:
    """Values on their way to CPU RAM: the copy is queued behind the device's work so far, and `values` waits for it."""

    def __init__(self, values: Tensor) -> None:
        self._done: Any = None
        if not can_pin(values.device):
            self._host = values.cpu()
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._done = torch.get_device_module(values.device).current_stream(values.device).record_event()

    def values(self) -> Tensor:
        """Return the values in CPU RAM, once they are there. Later work of the device is not waited for."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return self._host


class Timer:
    """The time that a device takes for the work queued between the creation and `stop`; on a CPU, that of Python."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._ended = self._mark()

    def stop(self) -> None:
        """End the time here."""
        self._ended = self._mark()

    def seconds(self) -> float:
        """Return the time. The device must have done the work."""
        if can_pin(self._device):
            return float(self._began.elapsed_time(self._ended)) / 1000
        return float(self._ended - self._began)

    def _mark(self) -> Any:
        if not can_pin(self._device):
            return time.perf_counter()
        runtime = torch.get_device_module(self._device)
        return runtime.current_stream(self._device).record_event(runtime.Event(enable_timing=True))


def fetch(tensor: Tensor) -> Tensor:
    """Return a tensor in CPU RAM: a copy through pinned memory, or itself if it is there. Waits for the copy."""
    return Readback(tensor).values()
