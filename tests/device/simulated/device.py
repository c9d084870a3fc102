"""A CUDA device that is simulated on the CPU.

    with SimulatedCuda() as cuda:
        run_the_product()               # sees cuda:0
    cuda.findings                       # what a GPU would refuse, race on, or do slowly

torch's FakeTensorMode says which device, dtype and strides a GPU's results have. This mode, above it, keeps the numbers
(on the CPU), checks what fake kernels do not (`rules`), and follows the streams (`streams`, `memory`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)

from tests.device.simulated import hooks
from tests.device.simulated.arguments import mapped, on_host, tensors_in, written
from tests.device.simulated.attention import WORKSPACES, attend_on_cpu
from tests.device.simulated.memory import Memory, key_of
from tests.device.simulated.places import here, told
from tests.device.simulated.rules import check
from tests.device.simulated.streams import Active, Queues

_DEVICE = torch.ops.prim.device.default
_ANSWERS = ("aten::equal", "aten::is_nonzero", "aten::_is_all_true", "aten::allclose")  # Python bools
_UNKNOWN_SHAPE = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim")
_FILLS = ("aten::copy_", "aten::fill_", "aten::zero_")  # do not read what they overwrite
_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
_COPIES = ("aten::copy_", "aten::_to_copy")


class SimulatedCuda(TorchDispatchMode):
    """One simulated device, `cuda:0`, while its context is entered."""

    def __init__(self, *, capability: tuple[int, int] = (9, 0), total_memory: int = 80 << 30) -> None:
        super().__init__()
        hooks.install()
        # Fake tensors would else initialise CUDA where torch.cuda.is_available() is true.
        FakeTensorMode.avoid_device_init = property(lambda self: True)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.capability, self.total_memory = capability, total_memory
        self.findings: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()
        self.num_operators = 0
        self.queues = Queues()
        self.memory = Memory(self.queues, self.findings)
        self.find = self.memory.find

    def __enter__(self) -> "SimulatedCuda":
        from tests.device.simulated.patches import patched  # patches need this module

        Active.queues = self.queues
        self._stack = ExitStack()
        self._stack.enter_context(patched(self))
        self._stack.enter_context(self.fake)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.__exit__(*error)

    # numbers

    def numbers(self, tensor: Tensor) -> Tensor:
        """Return the CPU tensor with the numbers of a simulated one; both views of a storage share memory too."""
        flat = self.memory.numbers.get(key_of(tensor))
        if flat is None:
            raise RuntimeError(f"no numbers for {tuple(tensor.shape)} {tensor.dtype} {tensor.device} @ {told(here())}")
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(flat.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    def taken_in(self, tensor: Tensor) -> Tensor:
        """Return a simulated stand-in for a tensor that was made outside; they share their numbers."""
        if isinstance(tensor, FakeTensor):
            return tensor
        with _disable_current_modes():  # not `off`, in which no fake tensor can be made
            stand_in = self.fake.from_tensor(tensor, static_shapes=True)
        with off():
            flat = torch.empty(0, dtype=torch.uint8)
            if tensor.device.type == "cpu":
                flat.set_(tensor.untyped_storage())
        if key_of(stand_in) not in self.memory.numbers:
            known = self.memory.watch(stand_in)
            self.memory.numbers[key_of(stand_in)] = flat
            if tensor.device.type == "cpu" and tensor.numel():
                known.pinned = self.memory.is_locked(tensor.untyped_storage().data_ptr())
        return stand_in

    def _give_numbers(self, tensor: Tensor, found: Tensor | None) -> None:
        """Store the numbers of a new tensor, whose dtype and padding may differ from those of the CPU's kernel."""
        if tensor.device.type == "meta":
            return
        flat = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8)
        self.memory.numbers[key_of(tensor)] = flat
        if found is None or not found.numel() or not tensor.numel():
            return
        view = self.numbers(tensor)
        if found.shape == tensor.shape:
            view.copy_(found)
        else:
            view.zero_()
            if found.dim() == view.dim() and all(a <= b for a, b in zip(found.shape, view.shape, strict=True)):
                view[tuple(slice(0, size) for size in found.shape)].copy_(found)

    def _new(self, found: Tensor, device: torch.device) -> Tensor:
        """Return a simulated tensor with these numbers."""
        made = torch.empty(found.shape, dtype=found.dtype, device=device)
        self.memory.watch(made)
        with off():
            self._give_numbers(made, found)
        return made

    # operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for so often that it costs more than all kernels
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not self.fake:
            return func(*args, **kwargs or {})  # someone reasons about shapes in a mode of their own
        if any(is_traceable_wrapper_subclass(value) for value in tensors_in((args, kwargs))):
            return NotImplemented  # it unwraps itself, and its parts come here
        self.num_operators += 1
        name = func.name().partition(".")[0]
        args, kwargs = mapped(self.taken_in, args), {key: mapped(self.taken_in, kwargs[key]) for key in kwargs or {}}
        tensors = tensors_in((args, kwargs))
        if name == "aten::_local_scalar_dense":
            self.wait(tensors, "item")
            with off():
                return self.numbers(tensors[0]).item()
        if name == "aten::is_pinned":
            return self.memory.is_pinned(tensors[0])
        if name == "aten::_pin_memory":
            return self._pinned(tensors[0])
        if name in _ANSWERS:
            self.wait(tensors, name)
            return bool(self._on_cpu(func, args, kwargs))
        check(name, args, kwargs, tensors, capability=self.capability, find=self.find)
        if name in _UNKNOWN_SHAPE:
            return self._of_unknown_shape(func, args, kwargs, tensors)
        try:
            out = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            return self._of_unknown_shape(func, args, kwargs, tensors)
        self._run(func, args, kwargs, tensors, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], out: Any) -> None:
        """Queue an operator whose simulated results are known, and compute their numbers."""
        name = func.name().partition(".")[0]
        made = tensors_in(out)
        fresh = [tensor for tensor in made if key_of(tensor) not in self.memory.storages]
        for tensor in fresh:
            self.memory.watch(tensor).pinned = bool(kwargs.get("pin_memory"))
        if name in WORKSPACES:
            self.memory.note_peak(name, WORKSPACES[name](args))
        writes = written(func, args, kwargs)
        if not fresh and not writes:
            return  # a view
        self._queue(name, args, kwargs, tensors, fresh, writes)
        if made and all(tensor.device.type == "meta" for tensor in made):
            return
        found = tensors_in(self._on_cpu(func, args, kwargs))
        new = {id(tensor) for tensor in fresh}
        # Attention's further results may be missing on the CPU.
        for tensor, numbers in zip(made, [*found, *[None] * len(made)], strict=False):
            if id(tensor) in new and key_of(tensor) not in self.memory.numbers:
                with off():
                    self._give_numbers(tensor, numbers)

    def _on_cpu(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on the numbers of its arguments."""

        with off():
            args = [on_host(mapped(self.numbers, value)) for value in args]
            kwargs = {key: on_host(mapped(self.numbers, value)) for key, value in kwargs.items()}
            kwargs.pop("pin_memory", None)
            attended = attend_on_cpu(func.name().partition(".")[0], args, kwargs)
            return func(*args, **kwargs) if attended is NotImplemented else attended

    def _of_unknown_shape(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        self.wait(tensors, func.name())
        device = tensors[0].device
        return mapped(lambda found: self._new(found, device), self._on_cpu(func, args, kwargs))

    def _pinned(self, tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor)
        self.memory.watch(made).pinned = True
        with off():
            self._give_numbers(made, self.numbers(tensor))
        return made

    # order

    def wait(self, tensors: Sequence[Tensor], reason: str) -> None:
        """Let the host wait for the current stream if it reads tensors of the device."""
        if not any(tensor.device.type == "cuda" for tensor in tensors):
            return
        self.queues.note_wait(reason)
        self.queues.host.join(self.queues.current.at())
        place = here()
        for tensor in tensors:
            self.memory.read(tensor, self.queues.host, reason, place)

    def read_on_host(self, tensor: Tensor, reason: str) -> None:
        """Note that Python reads a simulated tensor, waiting for it if it is on the device."""
        if tensor.device.type == "cuda":
            self.wait([tensor], reason)
        else:
            self.memory.read(tensor, self.queues.host, reason, here())

    def _queue(
        self, name: str, args: Any, kwargs: Any, tensors: list[Tensor], fresh: list[Tensor], writes: list[Tensor]
    ) -> None:
        """Add an operator to its queue: the current stream if any of its tensors is on the device, else the host."""
        host, place = self.queues.host, here()
        devices = {tensor.device.type for tensor in (*tensors, *fresh)}
        queue = self.queues.current if "cuda" in devices else host
        if queue is not host:
            queue.join(host.at())
        # An allocation is no kernel, but its memory may be in use by all kernels queued before it.
        queue.count += name not in _ALLOCATIONS
        filled = {key_of(tensor) for tensor in writes} if name in _FILLS else set()
        for tensor in tensors:
            if key_of(tensor) not in filled:
                is_scalar = tensor.device.type == "cpu" and tensor.dim() == 0 and name != "aten::copy_"
                self.memory.read(tensor, host if is_scalar else queue, name, place)
        for tensor in (*writes, *fresh):
            self.memory.write(tensor, queue, name, place)
        if name in _COPIES and devices >= {"cuda", "cpu"}:
            source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], fresh[0])
            asked = bool(kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
            self._copied(source, target, non_blocking=asked)

    def _copied(self, source: Tensor, target: Tensor, *, non_blocking: bool) -> None:
        """Note a copy between the host and the device."""
        to_device, queue = source.device.type == "cpu", self.queues.current
        if not non_blocking:
            if source.numel():
                self.queues.note_wait(f"blocking copy {'to' if to_device else 'from'} the device")
            self.queues.host.join(queue.at())
        elif not self.memory.is_pinned(source if to_device else target):
            self.find(f"pageable copy: non_blocking {'from' if to_device else 'into'} memory that is not pinned")
            if to_device:  # the driver has staged it when it returns: the host may write there at once
                self.memory.forget_read(source, queue)


@contextmanager
def off() -> Iterator[None]:
    """Compute on real tensors, outside of all modes."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        yield
