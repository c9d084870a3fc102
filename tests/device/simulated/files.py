"""Files of the simulated device: they are read and written outside of all modes, with the numbers."""

import sys
from collections.abc import Iterator
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from tests.device.simulated.device import SimulatedCuda, off
from tests.device.simulated.runtime import Patch

_IMPORTING = ("wan_train", "networks", "dataset", "cache_tools", "generate", "tests", "safetensors")


def file_patches(cuda: SimulatedCuda) -> Iterator[Patch]:
    """Yield the functions that read and write tensors, for each loaded module that has one by name."""
    replaced = [
        (safetensors.safe_open, _opening(safetensors.safe_open)),
        (safetensors.torch.load_file, _outside(safetensors.torch.load_file)),
        (safetensors.torch.save_file, _with_numbers(cuda, safetensors.torch.save_file)),
        (torch.load, _outside(torch.load)),
        (torch.save, _with_numbers(cuda, torch.save)),
    ]
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in _IMPORTING]
    for module in [torch, *modules]:
        for name, value in list(vars(module).items()):
            for before, after in replaced:
                if value is before:
                    yield module, name, after


def _outside(function: Any) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():  # not `off`: torch.load asks whether fake tensors are wanted
            return function(*args, **kwargs)

    return called


def _with_numbers(cuda: SimulatedCuda, function: Any) -> Any:
    """Return a function that writes tensors, with simulated ones in its first argument replaced by their numbers."""

    def number(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            return tensor
        cuda.read_on_host(tensor, "save")
        with off():
            return cuda.numbers(tensor).clone()

    def called(value: Any, *args: Any, **kwargs: Any) -> Any:
        value = tree_map_only(Tensor, number, dict(value) if isinstance(value, dict) else value)
        with _disable_current_modes():
            return function(value, *args, **kwargs)

    return called


def _opening(safe_open: Any) -> Any:
    class Opened:
        """A safetensors file whose tensors are real."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = safe_open(*args, **kwargs)

        def __enter__(self) -> "Opened":
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Tensor:
            with off():
                return self._file.get_tensor(name)

    return Opened
