"""What recomputed blocks keep, moved to CPU RAM and back: in time, in order, and nothing of it changed."""

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, UntypedStorage

from tests.unit.placement.blocks import CONFIG, Stack, step, take_gradients, tokens
from tests.unit.placement.counting import Meter, close, nbytes, same
from wan_train.placement import recompute
from wan_train.placement.offload import Call, Offload, Store
from wan_train.placement.settings import RecomputeSettings

CPU = torch.device("cpu")
Mark = tuple[str, int] | None  # direction of a copy and its number
MODES = ("full", "keep_attention")


class LazyLane:
    """Copies as late as the marks allow, and leaves nothing right where a copy has not been waited for.

    Copies of one direction are made in order, those of the other are not made because of them. It holds neither end of
    a copy: memory that is given up before its copy is done is noticed.
    """

    device = CPU

    def __init__(self) -> None:
        self.queues: dict[str, list[Callable[[], None]]] = {"out": [], "back": []}
        self.events: list[str] = []
        self.hosts: list[weakref.ref[UntypedStorage]] = []

    def host(self, num_bytes: int) -> Tensor:
        memory = torch.full((num_bytes,), 255, dtype=torch.uint8)  # NaN, whatever it is read as
        self.hosts.append(weakref.ref(memory.untyped_storage()))
        return memory

    def slot(self, num_bytes: int) -> Tensor:
        raise AssertionError("a slot is never given back")

    def mark(self) -> Mark:
        return None

    def upload(self, target: Tensor, source: Tensor, *after: Mark) -> Mark:
        assert self.is_host(source) and not self.is_host(target)
        return self._copy("back", target, source, after)

    def download(self, target: Tensor, source: Tensor, *after: Mark) -> Mark:
        assert self.is_host(target) and not self.is_host(source)
        return self._copy("out", target, source, after)

    def is_host(self, end: Tensor) -> bool:
        return end.untyped_storage() in [memory() for memory in self.hosts]

    def _copy(self, direction: str, target: Tensor, source: Tensor, after: tuple[Mark, ...]) -> Mark:
        assert target.numel() == source.numel()
        for mark in after:
            self.wait(mark)
        ends = [(weakref.ref(end.untyped_storage()), end.storage_offset()) for end in (target, source)]
        self.events.append(direction)
        target.fill_(255)

        def copy() -> None:
            views = []
            for memory, offset in ends:
                storage = memory()
                assert storage is not None, "memory was given up before its copy was done"
                views.append(torch.empty(0, dtype=torch.uint8).set_(storage, offset, (slot_bytes,), (1,)))
            views[0].copy_(views[1])

        slot_bytes = target.numel()
        self.queues[direction].append(copy)
        return direction, len(self.queues[direction])

    def wait(self, mark: Mark) -> None:
        if mark is not None:
            queue = self.queues[mark[0]]
            for number in range(mark[1]):
                queue[number]()
                queue[number] = lambda: None

    def far(self) -> int:
        """Bytes of CPU RAM in use."""
        return sum(storage.nbytes() for memory in self.hosts if (storage := memory()) is not None)


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> LazyLane:
    lazy = LazyLane()
    monkeypatch.setattr(recompute, "make_lane", lambda device: lazy)
    return lazy


def offloaded(mode: str, *, dropout: float = 0.0, num_layers: int = 3) -> Stack:
    stack = Stack(dropout=dropout, config=replace(CONFIG, num_layers=num_layers))
    settings = RecomputeSettings(recompute=mode, gradient_checkpointing_cpu_offload=True)
    recompute.apply_recompute(stack.blocks, settings, CPU)
    return stack


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_outputs_and_gradients_are_the_same_for_the_laziest_copies(lane: LazyLane, mode: str, dropout: float) -> None:
    stack, plain = offloaded(mode, dropout=dropout), Stack(dropout=dropout)
    for _ in range(3):
        assert same(step(stack, tokens()), step(plain, tokens()))
    different = tokens(), tokens(seed=9, batch=1, frames=4), tokens(seed=10, frames=1)
    assert same(step(stack, *different), step(plain, *different))
    assert lane.events


@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_gradients_are_the_same_on_the_cpu(mode: str) -> None:
    """Where each copy is done at once."""
    assert same(step(offloaded(mode), tokens()), step(Stack(), tokens()))


def test_a_graph_that_is_kept_gives_its_gradients_twice(lane: LazyLane) -> None:
    stack = offloaded("keep_attention")
    loss = stack(tokens()).square().mean()
    loss.backward(retain_graph=True)
    first = take_gradients(stack)
    loss.backward()
    assert same(take_gradients(stack), first)


def test_each_block_starts_the_copies_of_the_one_before_it(lane: LazyLane) -> None:
    stack = Stack()
    for number, block in enumerate(stack.blocks):
        block.forward = announced(block.forward, f"block {number}", lane.events)
    settings = RecomputeSettings(recompute="full", gradient_checkpointing_cpu_offload=True)
    recompute.apply_recompute(stack.blocks, settings, CPU)
    step(stack, tokens())
    forward, backward = lane.events[:6], lane.events[6:]
    assert forward == ["out", "block 0", "out", "block 1", "out", "block 2"]
    # The last block's input never left: nothing is copied at the turn.
    assert backward == ["back", "block 2", "back", "block 1", "block 0"]


def announced(forward: Callable[..., Tensor], name: str, events: list[str]) -> Callable[..., Tensor]:
    def call(*args: Tensor) -> Tensor:
        events.append(name)
        return forward(*args)

    return call


@pytest.mark.parametrize(("mode", "tensors"), [("full", 1), ("keep_attention", 3)])
def test_what_stays_on_the_device(lane: LazyLane, mode: str, tensors: int) -> None:
    """Of what blocks keep, the last one's and two blocks' on the way back: however many blocks there are. Attention's
    sums stay as well."""

    def measure(num_layers: int) -> tuple[int, int, int]:
        lane.hosts.clear()
        stack = offloaded(mode, num_layers=num_layers)
        with Meter() as meter:
            out = stack(tokens())
            live, far = meter.live(), lane.far()
            meter.peak = 0
            out.square().mean().backward()
        gradients = nbytes(*take_gradients(stack))
        return live - far, far, meter.peak - far - gradients

    x = tokens()
    each = 0 if mode == "full" else 2 * 4 * x.shape[0] * x.shape[1] * CONFIG.num_heads
    few, more = measure(4), measure(6)
    assert more[0] - few[0] == 2 * each
    assert more[1] >= 6 * tensors * nbytes(x)
    assert more[2] - few[2] <= 2 * each


def test_shared_inputs_stay_where_they_are(lane: LazyLane) -> None:
    step(offloaded("full", num_layers=1), tokens())
    assert lane.events == ["out"]
    step(offloaded("keep_attention", num_layers=1), tokens())
    assert lane.events == ["out"] * 4


@pytest.mark.parametrize("mode", MODES)
def test_main_memory_is_used_again(lane: LazyLane, mode: str) -> None:
    """After a step, after a graph that nobody asks for gradients, and after a failure."""
    stack = offloaded(mode)
    first = step(stack, tokens())
    made = len(lane.hosts)
    stack(tokens())
    with pytest.raises(RuntimeError):
        stack(torch.zeros(2, 24, CONFIG.dim + 1))
    assert same(step(stack, tokens()), first)
    for _ in range(5):
        step(stack, tokens())
    assert len(lane.hosts) <= made + 3


def test_nothing_moves_without_gradients(lane: LazyLane) -> None:
    stack = offloaded("full")
    with torch.no_grad():
        stack(tokens())
    assert lane.events == []


def test_what_is_too_short_makes_room(lane: LazyLane) -> None:
    store = Store(lane)
    for size in (10, 20, 30):
        store.give(lane.host(size))
    taken = [store.take(size) for size in (15, 25, 40)]
    assert [len(memory) for memory in taken] == [20, 30, 40]
    assert lane.far() == 90, "what was too short is still there"


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 1), lambda x: x[:, 1:3], lambda x: x[1].expand(5, 4, 6), lambda x: x.to(torch.bfloat16)],
)
def test_any_tensor_comes_back_as_it_was(lane: LazyLane, view: Callable[[Tensor], Tensor]) -> None:
    tensor = view(torch.randn(3, 4, 6))
    offload = Offload(lane)
    call = offload.begin()
    kept = call.keep(tensor)
    after = offload.begin()
    found = call.take(kept)
    assert torch.equal(found, tensor)
    assert found.stride() == torch.empty_like(tensor).stride()
    assert isinstance(after, Call)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_an_accelerator(mode: str) -> None:
    """With real queues, and blocks that are long enough for a wrong order to show."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    config = replace(CONFIG, dim=1024, ffn_dim=4096, num_heads=8, num_layers=12)
    x = torch.randn(1, 12 * 512, config.dim, device=device)
    results, peaks = [], []
    for offload in (False, True):
        stack = Stack(config=config).to(device)
        settings = RecomputeSettings(recompute=mode, gradient_checkpointing_cpu_offload=offload)
        recompute.apply_recompute(stack.blocks, settings, device)
        torch.cuda.reset_peak_memory_stats()
        results.append([tensor for _ in range(3) for tensor in step(stack, x)])
        peaks.append(torch.cuda.max_memory_allocated())
        del stack
    assert close(results[1], results[0], 1e-3)  # attention's backward adds in any order
    assert peaks[1] < peaks[0] - 8 * nbytes(x)
