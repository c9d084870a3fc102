"""torch.cuda of the simulated device, as the product and accelerate call it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from tests.device.simulated.device import SimulatedCuda
from tests.device.simulated.streams import Event, Stream

Patch = tuple[Any, str, Any]  # owner, name of the attribute, value

_NOT_REGISTERED = 713  # cudaErrorHostMemoryNotRegistered


class Cudart:
    """The functions of the CUDA runtime that torch.cuda.cudart() gives."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self.memory = cuda.memory

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.memory.locked.append((address, size))
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        kept = [entry for entry in self.memory.locked if entry[0] != address]
        found, self.memory.locked = len(kept) < len(self.memory.locked), kept
        return 0 if found else _NOT_REGISTERED


def runtime_patches(cuda: SimulatedCuda) -> Iterator[Patch]:
    """Yield what torch.cuda and torch.accelerator answer for the simulated device."""
    values = _about_device(cuda) | _about_memory(cuda) | _about_streams(cuda)
    yield from ((torch.cuda, name, value) for name, value in values.items())
    device = torch.device("cuda")
    yield torch.accelerator, "current_accelerator", lambda check_available=False: device
    yield torch.accelerator, "is_available", lambda: True


def _about_device(cuda: SimulatedCuda) -> dict[str, Any]:
    major, minor = cuda.capability
    properties = SimpleNamespace(
        name=f"simulated sm_{major}{minor}",
        major=major,
        minor=minor,
        total_memory=cuda.total_memory,
        multi_processor_count=132,
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "init": _nothing,
        "_lazy_init": _nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _nothing,
        "get_device_capability": lambda device=None: cuda.capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "manual_seed": _nothing,
        "manual_seed_all": _nothing,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": _nothing,
        "get_rng_state_all": list,
        "cudart": lambda: Cudart(cuda),
    }


def _about_memory(cuda: SimulatedCuda) -> dict[str, Any]:
    memory = cuda.memory

    def reset_peak(device: Any = None) -> None:
        memory.peak = memory.alive

    return {
        "empty_cache": _nothing,
        "ipc_collect": _nothing,
        "memory_allocated": lambda device=None: memory.alive,
        "memory_reserved": lambda device=None: memory.alive,
        "max_memory_allocated": lambda device=None: memory.peak,
        "max_memory_reserved": lambda device=None: memory.peak,
        "reset_peak_memory_stats": reset_peak,
        "mem_get_info": lambda device=None: (cuda.total_memory - memory.alive, cuda.total_memory),
    }


def _about_streams(cuda: SimulatedCuda) -> dict[str, Any]:
    queues = cuda.queues

    def synchronize(device: Any = None) -> None:
        queues.wait_for_all()
        queues.note_wait("torch.cuda.synchronize")

    return {
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: stream,  # a context of its own
        "current_stream": lambda device=None: queues.current,
        "default_stream": lambda device=None: queues.default,
        "synchronize": synchronize,
    }


def _nothing(*_: Any, **__: Any) -> None:
    return None
