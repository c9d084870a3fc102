"""torch.Generator for the simulated device: random numbers are the CPU's, the device is checked."""

import weakref
from typing import Any

import torch

_Generator = torch.Generator
_OF_DEVICE: set[int] = set()  # addresses of the C++ generators: operators get another Python object for the same one


class _DeviceGenerator(torch.Generator):
    device = torch.device("cuda", 0)  # type: ignore[assignment]


class _AnyGenerator(type(torch.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return issubclass(type(instance), _Generator)


class Generator(torch.Generator, metaclass=_AnyGenerator):
    """Stands in for the class torch.Generator, and makes generators of the simulated device too."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        if torch.device(device).type != "cuda":
            return _Generator(device)
        made = _DeviceGenerator()
        _OF_DEVICE.add(made._cdata)
        weakref.finalize(made, _OF_DEVICE.discard, made._cdata)
        return made


def device_type_of(generator: torch.Generator) -> str:
    """Return the device type that a generator was made for."""
    return "cuda" if generator._cdata in _OF_DEVICE else "cpu"
