"""A lane that copies as early or as late as the order of its queues allows, and a small model to stream over it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from networks.deltas.branch import attach_branch
from networks.deltas.lora import LoraBranch
from wan_train.placement.lanes import Lane
from wan_train.placement.settings import StreamSettings
from wan_train.placement.stream import Stream, apply_stream
from wan_train.precision import Linear

CPU = torch.device("cpu")
ATEN = torch.ops.aten
# What the engine and the lane do with slots themselves.
UNREAD = (ATEN.slice.Tensor, ATEN.fill_.Scalar, ATEN.copy_.default, ATEN._has_compatible_shallow_copy_type.default)


@dataclass
class Copy:
    target: Tensor
    source: Tensor


@dataclass
class RecordingLane:
    """Computes at once; copies when they are asked for or, `late`, not before they are waited for; downloads as late
    as that, too, unless `early_stores`. Copies of the two directions are not made in order.

    What is read of a slot is watched: nothing may be read while a copy to it is on its way, and a copy must come
    behind a mark that was taken after the slot's last reading.
    """

    late: bool
    early_stores: bool = False
    device: torch.device = CPU
    clock: int = 0
    slots: dict[int, Tensor] = field(default_factory=dict)
    pinned: list[Tensor] = field(default_factory=list)
    last_read: dict[int, int] = field(default_factory=dict)
    loading: list[Copy] = field(default_factory=list)
    storing: list[Copy] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)  # which pinned copy
    stores: list[int] = field(default_factory=list)  # to which pinned copy
    contents: dict[int, int] = field(default_factory=dict)  # the same by slot
    broken: bool = False
    on_host: Callable[[], None] = lambda: None

    def host(self, num_bytes: int) -> Tensor:
        self.on_host()
        self.pinned.append(torch.empty(num_bytes, dtype=torch.uint8))
        return self.pinned[-1]

    def slot(self, num_bytes: int) -> Tensor:
        slot = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
        self.slots[slot.untyped_storage().data_ptr()] = slot
        return slot

    def mark(self) -> int:
        return self.clock

    def upload(self, target: Tensor, source: Tensor, *after: "int | Copy") -> Copy:
        self.begin(target, source, after)
        self.uploads.append(next(i for i, known in enumerate(self.pinned) if known is source))
        self.contents[target.data_ptr()] = self.uploads[-1]
        return self.queued(self.loading, Copy(target, source), late=self.late)

    def download(self, target: Tensor, source: Tensor, *after: "int | Copy") -> Copy:
        self.begin(target, source, after)
        self.stores.append(next(i for i, known in enumerate(self.pinned) if known is target))
        return self.queued(self.storing, Copy(target, source), late=self.late and not self.early_stores)

    def begin(self, target: Tensor, source: Tensor, after: "tuple[int | Copy, ...]") -> None:
        taken = max(mark for mark in after if isinstance(mark, int))
        for memory in (target, source):
            assert self.last_read.get(memory.data_ptr(), 0) <= taken, "a copy may overtake the slot's last reading"
        for mark in after:
            if isinstance(mark, Copy):
                self.wait(mark)
        target.fill_(0xFF)
        if self.broken:
            raise ValueError("no memory")

    def queued(self, queue: list[Copy], copy: Copy, *, late: bool) -> Copy:
        queue.append(copy)
        if not late:
            self.wait(copy)
        return copy

    def wait(self, mark: Copy) -> None:
        for queue in (self.loading, self.storing):
            while any(copy is mark for copy in queue):
                copy = queue.pop(0)
                copy.target[: len(copy.source)].copy_(copy.source)

    def finish(self) -> None:
        for queue in (self.loading, self.storing):
            if queue:
                self.wait(queue[-1])

    def read(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address in self.slots:
            pending = (*self.loading, *self.storing)
            ends = {memory.data_ptr() for copy in pending for memory in (copy.target, copy.source)}
            assert address not in ends, "read before it was there, or while it was stored"
            self.clock += 1
            self.last_read[address] = self.clock


class Watch(TorchDispatchMode):
    """Tells a lane of every tensor that is computed with."""

    def __init__(self, lane: RecordingLane) -> None:
        super().__init__()
        self.lane = lane

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor) and func not in UNREAD:
                self.lane.read(leaf)
        return func(*args, **(kwargs or {}))


class ToyBlock(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.wide, self.narrow = Linear(8, width), Linear(width, 8)
        for linear in (self.wide, self.narrow):
            if dtype.itemsize == 1:
                linear.scale_weight = torch.rand(linear.out_features, 2, 1) + 0.5
            linear.weight.requires_grad_(False)
            linear.weight.data = linear.weight.data.to(dtype)
        self.requires_grad_(False)
        for linear in (self.wide, self.narrow):
            down, up = torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2)
            attach_branch(linear, LoraBranch(down, up, scale=0.5, dropout=0.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.tanh(self.wide(self.norm(x))))


class Toy(nn.Module):
    def __init__(
        self, num_blocks: int, dtype: torch.dtype = torch.float32, *, widths: Sequence[int] = (8, 12, 16)
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(ToyBlock(widths[i % len(widths)], dtype) for i in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def checkpointed(blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
    for block in blocks:

        def recomputed(*args: Any, _forward: Any = block.forward) -> Any:
            return checkpoint(_forward, *args, use_reentrant=False) if torch.is_grad_enabled() else _forward(*args)

        block.forward = recomputed


def stream_toy(toy: Toy, count: int, ring: int, lane: Lane) -> Stream:
    stream = apply_stream(toy.blocks, StreamSettings(blocks_to_swap=count, block_swap_ring_size=ring), lane)
    checkpointed(toy.blocks)
    return stream


def train_step(model: nn.Module, seed: int) -> list[Tensor]:
    """Output and gradients of a step that moves the trainable parameters."""
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))
    y = model(x)
    y.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    results = [y.detach(), *(p.grad for p in trained)]
    with torch.no_grad():
        for p in trained:
            p.sub_(0.01 * p.grad)
            p.grad = None
    return results


def preview(model: nn.Module, seed: int) -> list[Tensor]:
    with torch.no_grad():
        return [model(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)))]


def sample(model: nn.Module, seed: int) -> list[Tensor]:
    with torch.inference_mode():
        return [model(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)))]


def all_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@contextmanager
def untouched(copies: list[Tensor]) -> Iterator[None]:
    before = [copy.clone() for copy in copies]
    yield
    assert all_equal(copies, before)
