"""Copies that Python does not wait for, over the meta device in place of an accelerator."""

from collections.abc import Iterator

import pytest
import torch

from tests.waits import CPU, META, READ, Waits, counting_waits
from wan_train.placement.transfers import Readback, Timer, fetch, pinned, send


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    with counting_waits(monkeypatch) as found:
        yield found


def test_a_cpu_gets_the_tensor_itself() -> None:
    tensor = torch.ones(3)
    assert send(tensor, CPU) is tensor and pinned(tensor, CPU) is tensor and fetch(tensor) is tensor
    assert Readback(tensor).values() is tensor


def test_what_is_counted(waits: Waits) -> None:
    far, near = torch.ones(2), torch.ones(2, device=META)
    for wait in (
        lambda: float(near.sum()),
        lambda: bool(near.any()),
        lambda: near.cpu(),
        lambda: near.to(CPU, non_blocking=True),
        lambda: far.to(META),
        lambda: far.to(META, non_blocking=True),
        lambda: near.copy_(far),
        lambda: far.copy_(near, non_blocking=True),
    ):
        wait()
    assert waits.found == {READ: 2, "download": 3, "upload": 3}
    float(far.sum())
    assert waits.found.total() == 8
    with pytest.raises(NotImplementedError, match="nonzero"):
        near[near > 0]


def test_sending_waits_for_nothing(waits: Waits) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    for given in (tensor, tensor[:, 1:], tensor.t(), torch.tensor(1.0), tensor > 2):
        sent = send(given, META)
        assert sent.is_meta and sent.shape == given.shape and sent.dtype == given.dtype
    assert not waits.found


def test_pinned_memory_has_the_values_and_is_not_copied_again(waits: Waits) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    for given in (tensor, tensor[:, 1:], tensor.t()):
        once = pinned(given, META)
        assert torch.equal(once, given) and once.is_pinned()
        assert pinned(once, META) is once
    assert pinned(tensor.to(META), META).is_meta


def test_values_are_waited_for_when_they_are_read_and_once(waits: Waits) -> None:
    reading = Readback(torch.zeros(3, device=META))
    torch.zeros(9, device=META).add_(1)
    assert not waits.found
    assert reading.values().tolist() == [1, 1, 1] and reading.values().is_pinned()
    assert waits.found == {"event": 1}


def test_the_device_is_timed_without_a_wait_of_its_own(waits: Waits) -> None:
    timer = Timer(META)
    work = torch.zeros(3, device=META).add_(1)
    timer.stop()
    with pytest.raises(AssertionError, match="not known yet"):
        timer.seconds()
    Readback(work).values()
    assert timer.seconds() == 1.0 and waits.found == {"event": 1}


def test_a_cpu_is_timed_by_the_clock() -> None:
    timer = Timer(CPU)
    timer.stop()
    first = timer.seconds()
    assert 0 <= first == timer.seconds()
