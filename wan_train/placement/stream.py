"""Block swap: keep the matrices of some blocks in CPU RAM and copy them to the device when their block runs.

Each streamed block has a pinned host copy, one flat buffer in CPU RAM, and its tensors are views: of the host copy, or,
from the block's run until its slot is reused, of one of a few slots on the device. A slot is filled by a single copy
while earlier blocks compute. The host copy is read-only unless its matrices are trained: then the optimizer updates
them in the slot, while the block is `held`, and the slot is copied back.

The next block is predicted from the order of use. In the forward pass the following blocks are prefetched; in the
backward pass, where checkpointing calls each block again, the previous ones; without gradients the first blocks follow
the last, for the next pass. With R slots for S blocks the last R blocks are still in slots when the backward pass
starts, and the first R when the next forward pass starts: a training step copies 2(S-R) blocks, a pass without
gradients S, or none if R = S.

Why no copy overwrites data that is still needed. `bring` is called when a block starts, in the forward pass or in its
recomputation, and all that it overwrites belongs to other blocks. At that time every use of these has been queued in
the compute stream. Copies of one direction run in the order in which they are queued, and one that fills a slot waits
for the last copy from that slot: a slot is stored before it is filled again. A host copy is read only after its slot
has been filled with another block, so it is complete then. In the forward pass this is obvious. In the backward pass
autograd runs ready nodes in the reverse order of recording, and a block is recomputed when the first of its own nodes
runs: by then all nodes of later blocks have run, because each was recorded later and none of them depends on a node of
this block. So a copy that waits for the event recorded in `bring` runs after them all. Without checkpointing autograd
would read a block's weights after they have been overwritten: their version counters are incremented on eviction, so
that autograd raises an error instead of computing wrong gradients.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from wan_train.placement.lanes import Lane, Mark
from wan_train.placement.settings import StreamSettings

_ALIGNMENT = 256  # bytes, as in device allocators


@dataclass(frozen=True)
class _Span:
    """The location of a tensor in a flat buffer."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        return memory[self.offset : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Cargo:
    """The streamed tensors of one block, and its pinned host copy."""

    tensors: list[Tensor]
    layout: tuple[_Span, ...]
    pinned: Tensor
    views: list[Tensor]  # of the pinned host copy

    def rest(self) -> None:
        """Make the tensors views of the pinned host copy."""
        self.bind(self.views)

    def bind(self, views: list[Tensor]) -> None:
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view


@dataclass
class _Slot:
    memory: Tensor
    views: dict[tuple[_Span, ...], list[Tensor]]
    holds: int | None = None
    ready: Mark | None = None


class Stream:
    """The streamed blocks of one model, numbered in forward order. Created by `apply_stream`."""

    def __init__(self, cargos: list[_Cargo], lane: Lane, ring_size: int) -> None:
        self._cargos, self._lane = cargos, lane
        self._slots = [self._make_slot() for _ in range(min(ring_size, len(cargos)))]
        self._last, self._step = 0, 1
        self._owners = {id(tensor): number for number, cargo in enumerate(cargos) for tensor in cargo.tensors}

    def _make_slot(self) -> _Slot:
        memory = self._lane.slot(max(len(cargo.pinned) for cargo in self._cargos))
        layouts = {cargo.layout for cargo in self._cargos}
        return _Slot(memory, {layout: _views(layout, memory) for layout in layouts})

    @property
    def host_bytes(self) -> int:
        """Return the CPU RAM of the pinned host copies."""
        return sum(len(cargo.pinned) for cargo in self._cargos)

    @property
    def device_bytes(self) -> int:
        """Return the device memory of the slots."""
        return sum(len(slot.memory) for slot in self._slots)

    @property
    def slots(self) -> Iterator[Tensor]:
        """Yield the device memory of the slots, flat."""
        return (slot.memory for slot in self._slots)

    def names(self, model: nn.Module) -> set[str]:
        """Return the names in `model` of the streamed tensors, which must not be moved, sharded or broadcast."""
        return {name for name, tensor in _named_tensors(model) if id(tensor) in self._owners}

    def settle(self) -> None:
        """Make all tensors views of their complete host copies until their blocks are called again."""
        for cargo in self._cargos:
            cargo.rest()
        self._lane.finish()

    def forget(self) -> None:
        """Do the same as `settle` and invalidate the slots, so that blocks see what is written to the tensors now."""
        self.settle()
        for slot in self._slots:
            slot.holds = slot.ready = None

    @contextmanager
    def held(self, weights: Iterable[Tensor]) -> Iterator[None]:
        """Have the blocks of these trained weights on the device within the context, and copy them back afterwards.

        Weights that are not streamed are not moved.
        """
        trained = {id(weight) for weight in weights if weight.requires_grad}
        numbers = sorted({self._owners[weight] for weight in trained & self._owners.keys()})
        for number in numbers:
            self.bring(number)
        yield
        for number in numbers:
            self._store(number)

    def _store(self, block: int) -> None:
        slot = next(slot for slot in self._slots if slot.holds == block)
        pinned = self._cargos[block].pinned
        # The next use of the slot, which may write to it, waits for the copy.
        slot.ready = self._lane.download(pinned, slot.memory[: len(pinned)], self._lane.mark())

    def bring(self, block: int) -> None:
        """Have a block's tensors on the device for all work queued until the next call, and prefetch."""
        wanted = self._ahead(block)
        held = {slot.holds: slot for slot in self._slots}
        missing = [other for other in wanted if other not in held]
        if missing:
            launched = self._lane.mark()
            for other in missing:
                held[other] = self._load(other, launched, wanted)
        slot = held[block]
        if slot.ready is not None:
            self._lane.wait(slot.ready)
            slot.ready = None
        cargo = self._cargos[block]
        cargo.bind(slot.views[cargo.layout])
        self._last = block

    def _ahead(self, block: int) -> list[int]:
        """Return the blocks that are needed next, this one first."""
        count, steps = len(self._cargos), range(len(self._slots))
        if not torch.is_grad_enabled():
            return [(block + step) % count for step in steps]
        if block in (0, count - 1):
            self._step = 1 if block == 0 else -1
        elif block != self._last:
            self._step = 1 if block > self._last else -1
        ahead = [block + self._step * step for step in steps]
        return [other for other in ahead if 0 <= other < count]

    def _load(self, block: int, after: Mark, wanted: list[int]) -> _Slot:
        """Fill the slot whose block is farthest from the wanted ones."""
        free = [slot for slot in self._slots if slot.holds not in wanted]
        slot = max(free, key=lambda s: math.inf if s.holds is None else abs(s.holds - wanted[0]))
        self._evict(slot)
        marks = [after] if slot.ready is None else [after, slot.ready]
        slot.ready = self._lane.upload(slot.memory, self._cargos[block].pinned, *marks)
        slot.holds = block
        return slot

    def _evict(self, slot: _Slot) -> None:
        if slot.holds is None:
            return
        cargo = self._cargos[slot.holds]
        slot.holds = None
        cargo.rest()
        for tensor in cargo.tensors:
            increment_version(tensor)


def apply_stream(blocks: Iterable[nn.Module], settings: StreamSettings, lane: Lane) -> Stream:
    """Stream `settings.blocks_to_swap` evenly spaced blocks; adapters, biases and norms stay on the device.

    Parameters and buffers of Linears with two or more dimensions are moved to CPU RAM, block by block, or may be there
    already; trained ones are updated while their block is `held`. Apply it before checkpointing: without checkpointing
    these blocks have no backward pass. A `state_dict` contains the pinned host copies.
    """
    every = list(blocks)
    indexes = streamed_blocks(len(every), settings.blocks_to_swap)
    chosen = [every[index] for index in indexes]
    cargos = [_pack(block, lane) for block in chosen]
    stream = Stream(cargos, lane, settings.block_swap_ring_size)
    for number, (block, cargo) in enumerate(zip(chosen, cargos, strict=True)):
        block.forward = _brought(block.forward, stream, number)
        block.register_state_dict_pre_hook(lambda *_, cargo=cargo: cargo.rest())
    return stream


def streamed_blocks(num_blocks: int, num_streamed: int) -> list[int]:
    """Return the indices of streamed blocks: evenly spaced, so that copies overlap with the blocks between them."""
    return [((2 * i + 1) * num_blocks) // (2 * num_streamed) for i in range(num_streamed)]


def _brought(forward: Callable[..., Any], stream: Stream, number: int) -> Callable[..., Any]:
    @wraps(forward)
    def brought(*args: Any, **kwargs: Any) -> Any:
        # No cleanup afterwards: checkpointing exits a block by an exception once it has recomputed what it needs.
        stream.bring(number)
        return forward(*args, **kwargs)

    return brought


def _pack(block: nn.Module, lane: Lane) -> _Cargo:
    """Move the streamed tensors of a block into its pinned host copy; the memory that held them can be freed then."""
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    own = [t for m in linears for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    tensors = [tensor for tensor in own if tensor.ndim >= 2]
    assert tensors, "a block without matrices cannot stream"
    layout = _lay_out(tensors)
    pinned = lane.host(layout[-1].end)
    cargo = _Cargo(tensors, layout, pinned, _views(layout, pinned))
    for tensor, view in zip(tensors, cargo.views, strict=True):
        view.copy_(tensor.data)
    cargo.rest()
    return cargo


def _views(layout: tuple[_Span, ...], memory: Tensor) -> list[Tensor]:
    return [span.view(memory) for span in layout]


def _lay_out(tensors: list[Tensor]) -> tuple[_Span, ...]:
    layout: list[_Span] = []
    for tensor in tensors:
        offset = -(-layout[-1].end // _ALIGNMENT) * _ALIGNMENT if layout else 0
        layout.append(_Span(offset, tensor.shape, tensor.dtype))
    return tuple(layout)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
