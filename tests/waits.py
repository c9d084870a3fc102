"""Count where Python waits for a device, with the meta device in its place: its tensors have no values, so that any
value that is read must have been waited for."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan_train.placement import transfers
from wan_train.training import outcome

META, CPU = torch.device("meta"), torch.device("cpu")
READ = "aten::_local_scalar_dense"  # of item(), float(), bool() and int()


class Event:
    """The end of some work, which is done when Python has waited for it or for later work."""

    def __init__(self, waits: "Waits", number: int = 0) -> None:
        self._waits, self.number = waits, number

    def synchronize(self) -> None:
        self._waits.until(self.number, "event")

    def elapsed_time(self, other: "Event") -> float:
        assert max(self.number, other.number) <= self._waits.done, "the time is not known yet"
        return 1000.0


class Waits(TorchDispatchMode):
    """Counts, by kind, what makes Python wait for the meta device, in `found`: a value that is read (`READ`), a
    blocking copy from or to it (`download`, `upload`), an event. Values read are 1.

    The meta device itself refuses operators whose result has a shape that depends on values, such as `nonzero`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.queued = self.done = 0  # numbers of operators
        self.pinned: dict[int, Any] = {}  # storages by address

    def until(self, number: int, kind: str) -> None:
        """Wait for the operators up to a number, if they are not done."""
        if number > self.done:
            self.found[kind] += 1
            self.done = number

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and tensor.untyped_storage().data_ptr() in self.pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.name()
        self.queued += 1
        if name == READ and args[0].is_meta:
            self.until(self.queued, READ)
            return 1.0
        if name == "aten::_to_copy" and torch.device(kwargs.get("device") or args[0].device) != args[0].device:
            return self._moved(func, args, kwargs)
        if name == "aten::copy_" and args[0].is_meta != args[1].is_meta:
            return self._copied(func, args, kwargs)
        if kwargs.pop("pin_memory", None):
            return self.pin(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        source = args[0]
        if source.is_meta:  # to memory that is not pinned: waits, whether it is asked to or not
            self.until(self.queued, "download")
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if not (kwargs.get("non_blocking") and self.is_pinned(source)):
            self.until(self.queued, "upload")
        return func(*args, **kwargs)

    def _copied(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        target, source = args[:2]
        asked = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if not (asked and self.is_pinned(source if target.is_meta else target)):
            self.until(self.queued, "upload" if target.is_meta else "download")
        return func(*args, **kwargs) if target.is_meta else target.fill_(1)


@contextmanager
def counting_waits(patch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Let the meta device be an accelerator with pinned memory and events, and count the waits for it."""
    waits = Waits()

    def record(event: Event | None = None) -> Event:
        event = event or Event(waits)
        event.number = waits.queued
        return event

    stream = SimpleNamespace(record_event=record)
    runtime = SimpleNamespace(
        current_stream=lambda _: stream, Event=lambda enable_timing: Event(waits), manual_seed=lambda _: None
    )
    with patch.context() as patched:
        for module in (transfers, outcome):
            patched.setattr(module, "can_pin", lambda device: device.type == "meta")
        patched.setattr(torch, "get_device_module", lambda _: runtime)
        patched.setattr(Tensor, "pin_memory", lambda self: waits.pin(self.clone()))
        patched.setattr(Tensor, "is_pinned", lambda self: waits.is_pinned(self))
        with waits:
            yield waits
