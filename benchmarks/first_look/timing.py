"""Time work on a device."""

import time
from collections.abc import Callable
from typing import Any

import torch


def runtime_of(device: torch.device) -> Any:
    """Return torch's module of the device's type, with streams and `synchronize`; on a CPU they do nothing."""
    return torch.get_device_module(device)


def seconds_of(call: Callable[[], object], device: torch.device, *, repeats: int = 1, warm_up: int = 1) -> float:
    """Return the seconds of one call: the mean over `repeats` calls in a row, after `warm_up` calls."""
    runtime = runtime_of(device)
    for _ in range(warm_up):
        call()
    runtime.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    runtime.synchronize()
    return (time.perf_counter() - began) / repeats
