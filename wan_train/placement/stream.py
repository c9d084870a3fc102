"""Block swap: the matrices of some blocks stay in CPU RAM and come to the device for their block's turn.

Each such block has a pinned, one flat piece of CPU RAM, and its tensors are views: of the pinned, or, from the
block's turn until its slot is needed, of one of a few slots on the device. A slot is filled by one copy, while blocks
before it compute. A pinned is only ever read, unless its matrices are trained: then the optimizer steps them in the
slot, while the block is `held`, and the slot is copied back.

Which block comes next follows from the order of use. Forward, the next ones are fetched; in the backward pass, where
checkpointing calls each block once more, the previous ones; without gradients the first follow the last, for the next
pass. With R slots for S blocks the last R blocks are still there when the pass turns, and the first R when the next
one begins: a training step copies 2(S-R) blocks, a pass without gradients S, or none if R = S.

Why no copy lands on what is still needed. `bring` is called when a block begins, forward or once more in the backward
pass, and all that it overwrites belongs to other blocks. By then every use of these has been put into the computing
queue. Copies in both directions are made in the order in which they are asked for, so that a slot is stored before it
is filled again, and a pinned is whole before it is read. Forward that is plain. In the backward pass autograd runs
what is ready in the reverse order in which it was recorded, and a block is recomputed when the first of its own
steps runs: by then all steps of later blocks have run, for each was recorded later, and none of them waits for a step
of this block. So a copy that waits for the mark taken in `bring` comes behind them all. Without checkpointing autograd
would read a block's weights after they are gone: their version counters are raised when they go, so that it raises an
error instead of giving wrong gradients.
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

_ALIGNMENT = 256  # bytes, as the allocators of devices have it


@dataclass(frozen=True)
class _Span:
    """Where in a flat piece of memory a tensor lies."""

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
    """What streams of one block, and its pinned."""

    tensors: list[Tensor]
    layout: tuple[_Span, ...]
    pinned: Tensor
    views: list[Tensor]  # of the pinned

    def rest(self) -> None:
        """Let the tensors be views of the pinned."""
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
    """The streamed blocks of one model, numbered in the order of its forward pass. Made by `apply_stream`."""

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
        """CPU RAM for the pinned host copies."""
        return sum(len(cargo.pinned) for cargo in self._cargos)

    @property
    def device_bytes(self) -> int:
        """Memory of the slots on the device."""
        return sum(len(slot.memory) for slot in self._slots)

    @property
    def slots(self) -> Iterator[Tensor]:
        """The memory of the slots on the device, flat."""
        return (slot.memory for slot in self._slots)

    def names(self, model: nn.Module) -> set[str]:
        """The names in `model` of the tensors that stream: what must not be moved, sharded or broadcast."""
        return {name for name, tensor in _named_tensors(model) if id(tensor) in self._owners}

    def settle(self) -> None:
        """Let all tensors be views of their pinned copies, which are whole, until their blocks are called again."""
        for cargo in self._cargos:
            cargo.rest()
        self._lane.finish()

    def forget(self) -> None:
        """The same, and the slots hold nothing: what is written into the tensors now is what blocks will see."""
        self.settle()
        for slot in self._slots:
            slot.holds = slot.ready = None

    @contextmanager
    def held(self, weights: Iterable[Tensor]) -> Iterator[None]:
        """While it lasts the blocks whose trained matrices are among these weights are on the device, and what is
        written to them is kept. Other weights stay where they are."""
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
        # Whoever uses the slot next waits for the copy: it may write there.
        slot.ready = self._lane.upload(pinned, slot.memory[: len(pinned)], self._lane.mark())

    def bring(self, block: int) -> None:
        """Have a block's tensors on the device for all that is launched until the next call, and fetch ahead."""
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
        """The blocks that are needed next, this one first."""
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
        """Fill the slot of the block farthest from what is wanted."""
        free = [slot for slot in self._slots if slot.holds not in wanted]
        slot = max(free, key=lambda s: math.inf if s.holds is None else abs(s.holds - wanted[0]))
        self._evict(slot)
        slot.ready = self._lane.upload(slot.memory, self._cargos[block].pinned, after)
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
    """Let `settings.blocks_to_swap` evenly spaced blocks stream; adapters, biases and norms stay where they are.

    Parameters and buffers of the Linears with two axes and more go into CPU RAM, block by block, and may be there
    before; those that are trained are stepped while their block is `held`. Put it inside of checkpointing: without that
    these blocks have no backward pass. A `state_dict` holds the pinned copies.
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
    """Which blocks stream: evenly spaced, so that each has others before it that compute while it comes."""
    return [((2 * i + 1) * num_blocks) // (2 * num_streamed) for i in range(num_streamed)]


def _brought(forward: Callable[..., Any], stream: Stream, number: int) -> Callable[..., Any]:
    @wraps(forward)
    def brought(*args: Any, **kwargs: Any) -> Any:
        # Nothing is undone afterwards: checkpointing leaves a block by an exception once it has what it needs.
        stream.bring(number)
        return forward(*args, **kwargs)

    return brought


def _pack(block: nn.Module, lane: Lane) -> _Cargo:
    """Move what streams of a block into its pinned; what held it before is free then."""
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
