"""What Python does with a tensor's memory without an operator: numpy, lists, pointers, pinning, `.data`, storages."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tests.device.simulated.device import SimulatedCuda, off
from tests.device.simulated.memory import key_of
from tests.device.simulated.runtime import Patch
from tests.device.simulated.streams import Stream


def tensor_patches(cuda: SimulatedCuda) -> Iterator[Patch]:
    """Yield methods of Tensor and its storage that know simulated tensors."""
    yield from _reading(cuda)
    yield from _pinning(cuda)
    yield Tensor, "record_stream", lambda tensor, stream: _record(cuda, tensor, stream)
    yield Tensor, "cuda", lambda tensor, *_, **__: tensor.to("cuda")
    yield torch.nn.Module, "cuda", lambda module, *_: module.to("cuda")
    yield torch.nn.Module, "_apply", _apply
    yield torch.UntypedStorage, "resize_", _resizing(cuda)


def data_patch(cuda: SimulatedCuda) -> Patch:
    """Return `.data` of simulated tensors, whose setter takes tensors of another device, as that of real ones does."""
    base = torch._C.TensorBase.data

    def set_data(self: Any, value: Tensor) -> None:
        value = cuda.taken_in(value)
        base.__set__(self, value)
        self.fake_device = value.fake_device  # type: ignore[attr-defined]

    return FakeTensor, "data", property(base.__get__, set_data)


def _record(cuda: SimulatedCuda, tensor: Tensor, stream: Stream) -> None:
    cuda.memory.storages[key_of(tensor)].recorded.add(stream.name)


def _reading(cuda: SimulatedCuda) -> Iterator[Patch]:
    to_numpy, to_list, data_ptr = Tensor.numpy, Tensor.tolist, Tensor.data_ptr

    def numpy(self: Tensor, **_: Any) -> Any:
        if self.device.type != "cpu":
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        if not isinstance(self, FakeTensor):
            return to_numpy(self)
        cuda.read_on_host(self, "numpy")
        with off():
            return to_numpy(cuda.numbers(self))

    def array(self: Tensor, dtype: Any = None, copy: Any = None) -> Any:
        found = numpy(self)
        return found if dtype is None else found.astype(dtype)

    def tolist(self: Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return to_list(self)
        cuda.read_on_host(self, "tolist")
        with off():
            return cuda.numbers(self).tolist()

    def pointer(self: Tensor) -> int:
        if not isinstance(self, FakeTensor):
            return data_ptr(self)
        with off():
            return data_ptr(cuda.numbers(self))

    yield Tensor, "numpy", numpy
    yield Tensor, "__array__", array
    yield Tensor, "tolist", tolist
    yield FakeTensor, "tolist", tolist
    yield Tensor, "data_ptr", pointer


def _pinning(cuda: SimulatedCuda) -> Iterator[Patch]:
    pin, locked = Tensor.pin_memory, cuda.memory

    def is_pinned(self: Tensor, *_: Any) -> bool:
        return locked.is_pinned(self) if isinstance(self, FakeTensor) else locked.is_locked(self.data_ptr())

    def pin_memory(self: Tensor, *_: Any) -> Tensor:
        if isinstance(self, FakeTensor):
            return pin(self)
        with off():  # a thread that reads ahead has no modes
            made = self.clone()
        storage = made.untyped_storage()
        entry = (storage.data_ptr(), storage.nbytes())
        locked.locked.append(entry)
        weakref.finalize(storage, lambda: entry in locked.locked and locked.locked.remove(entry))
        return made

    yield Tensor, "is_pinned", is_pinned
    yield Tensor, "pin_memory", pin_memory


def _apply(self: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """Do what nn.Module does for plain tensors, by `.data`, which it does not try for fake ones."""
    for module in self.children():
        module._apply(function)
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = function(parameter.detach())
                if parameter.grad is not None:
                    parameter.grad.data = function(parameter.grad.detach())
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def _resizing(cuda: SimulatedCuda) -> Any:
    resize = torch.UntypedStorage.resize_

    def resized(self: torch.UntypedStorage, size: int) -> Any:
        """Follow what frees and takes memory without an operator, as FSDP does."""
        key = int(self._cdata)
        result = resize(self, size)
        if key in cuda.memory.storages:
            cuda.memory.resize(key, size)
        if key in cuda.memory.numbers:
            with off():
                before, after = cuda.memory.numbers[key], torch.empty(size, dtype=torch.uint8)
                kept = min(size, len(before))
                after[:kept] = before[:kept]
                cuda.memory.numbers[key] = after
        return result

    return resized
