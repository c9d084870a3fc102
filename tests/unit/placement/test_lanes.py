import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from wan_train.placement import lanes
from wan_train.placement.lanes import AcceleratorLane, HostLane, make_lane

CUDA = torch.device("cuda")


class FakeQueue:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"{self.name} marks")
        return f"mark of {self.name}"

    def synchronize(self) -> None:
        self.log.append(f"{self.name} synchronizes")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


class FakeRuntime:
    """A device's runtime with streams that only write down what is asked of them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.made = 0
        self.current = FakeQueue("compute", self.log)

    def Stream(self, device: torch.device) -> FakeQueue:
        self.made += 1
        return FakeQueue(["uploads", "downloads"][self.made - 1], self.log)

    def current_stream(self, device: torch.device) -> FakeQueue:
        return self.current

    @contextlib.contextmanager
    def stream(self, queue: FakeQueue) -> Iterator[None]:
        before, self.current = self.current, queue
        yield
        self.current = before


class FakeCudart:
    """Locks all that it is asked to, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.locked = limit, dict[int, int]()

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if num_bytes > self.limit:
            return 2
        self.locked[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    return fake


def test_an_accelerator_copies_beside_its_computation_in_the_order_of_marks(runtime: FakeRuntime) -> None:
    lane = make_lane(CUDA)
    assert isinstance(lane, AcceleratorLane)
    slot, source = torch.zeros(8, dtype=torch.uint8), torch.arange(5, dtype=torch.uint8)
    launched = lane.mark()
    lane.wait(lane.upload(slot, source, launched))
    assert slot.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert runtime.log == [
        "compute marks",
        "uploads waits for mark of compute",
        "uploads marks",
        "compute waits for mark of uploads",
    ]


def test_each_direction_has_a_stream_and_waits_for_the_marks_that_it_is_given(runtime: FakeRuntime) -> None:
    lane = make_lane(CUDA)
    slot, host = torch.arange(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    stored = lane.download(host, slot, lane.mark())
    assert host.tolist() == [0, 1, 2, 3, 4]
    lane.upload(slot, host, lane.mark(), stored)
    assert runtime.log == [
        "compute marks",
        "downloads waits for mark of compute",
        "downloads marks",
        "compute marks",
        "uploads waits for mark of compute",
        "uploads waits for mark of downloads",
        "uploads marks",
    ]
    runtime.log.clear()
    lane.finish()
    assert runtime.log == ["uploads synchronizes", "downloads synchronizes"]


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_a_device_of_one_queue_copies_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    lane = make_lane(torch.device(name))
    assert isinstance(lane, HostLane)
    slot, source = torch.zeros(4, dtype=torch.uint8), torch.arange(3, dtype=torch.uint8)
    lane.upload(slot, source, lane.mark())
    assert slot.tolist() == [0, 1, 2, 0]


def test_main_memory_for_cuda_is_exact_locked_and_freed(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart(limit=10**6)
    finished: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", finished.append)
    memory = AcceleratorLane(CUDA).host(5000)
    view = memory[256:264].view(torch.float32)
    assert cudart.locked == {memory.data_ptr(): 5000}
    del memory
    gc.collect()
    view.fill_(1.0)  # a view keeps it all
    assert cudart.locked and not finished
    del view
    gc.collect()
    assert not cudart.locked and finished == [CUDA]


def test_a_forked_worker_does_not_unlock_what_its_parent_uses(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = FakeCudart(limit=10**6)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = AcceleratorLane(CUDA).host(5000)
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    del memory
    gc.collect()
    assert cudart.locked


def test_memory_that_cannot_be_locked_is_ordinary_and_said_to_be(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch can pin memory here")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCudart(limit=10))
    forgotten: list[torch.device] = []
    monkeypatch.setattr(lanes, "_forget_error", forgotten.append)
    monkeypatch.setattr(logging.getLogger("wan_train_log"), "propagate", True)
    lane = AcceleratorLane(CUDA)
    memory = lane.host(5000)
    assert memory.shape == (5000,) and forgotten == [CUDA]
    assert "slower" in caplog.text
    caplog.clear()
    assert lane.host(20).shape == (20,)
    assert caplog.text == ""


@pytest.mark.gpu
def test_cuda_locks_exact_memory_and_copies_from_it() -> None:
    lane = make_lane(torch.device("cuda", torch.cuda.current_device()))
    source = lane.host(3 * 2**20 + 5)
    assert source.is_pinned() and len(source) == 3 * 2**20 + 5
    source.random_(0, 256)
    slot = lane.slot(2**22)
    lane.wait(lane.upload(slot, source, lane.mark()))
    assert torch.equal(slot[: len(source)].cpu(), source)
    address = source.data_ptr()
    del source
    gc.collect()
    assert int(torch.cuda.cudart().cudaHostUnregister(address)) != 0  # it was unlocked when it went
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
