import threading
from types import SimpleNamespace

import pytest
import torch

from dataset.batching.ahead import read_ahead


def test_everything_comes_in_order() -> None:
    assert list(read_ahead(range(5))) == [0, 1, 2, 3, 4]
    assert list(read_ahead([])) == []


def test_one_more_is_fetched_while_the_last_is_in_use() -> None:
    taken: list[int] = []
    fetched = [threading.Event() for _ in range(5)]

    def load():
        for number in range(5):
            taken.append(number)
            fetched[number].set()
            yield number

    ahead = read_ahead(load())
    assert next(ahead) == 0
    assert fetched[1].wait(5)
    assert taken == [0, 1]
    assert next(ahead) == 1
    ahead.close()
    assert taken[-1] <= 2


@pytest.mark.parametrize(("name", "used"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_thread_uses_the_device_of_its_process(name: str, used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread begins with the first device: what it pins for another takes memory there."""
    told: list[tuple[str, int]] = []
    runtime = SimpleNamespace(set_device=lambda device: told.append((str(device), threading.get_ident())))
    monkeypatch.setattr(torch, "get_device_module", lambda _: runtime)
    threads: list[int] = []

    def load():
        threads.append(threading.get_ident())
        assert [device for device, _ in told] == used, "before the first batch"
        yield 1

    assert list(read_ahead(load(), device=torch.device(name))) == [1]
    assert [thread for _, thread in told] == threads * len(used)


def test_an_error_comes_in_its_turn() -> None:
    def load():
        yield 1
        raise ValueError("a broken cache")

    ahead = read_ahead(load())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="a broken cache"):
        next(ahead)
