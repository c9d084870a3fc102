import threading
import time

import pytest
import torch

from cache_tools import runner
from cache_tools.runner import rank_device, work_ahead
from wan_train.distributed.ranks import Place


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_results_keep_the_order_of_the_tasks(num_workers):
    def work(number):
        time.sleep(0.002 * (number % 3))
        return number

    assert list(work_ahead(work, range(20), num_workers)) == list(range(20))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_no_more_is_done_ahead_than_asked(num_workers):
    started = []
    results = work_ahead(started.append, range(20), num_workers)
    for taken in range(1, 10):
        next(results)
        time.sleep(0.01)
        assert len(started) <= taken + num_workers


def test_work_goes_on_while_a_result_is_in_use():
    second = threading.Event()

    def work(number):
        if number == 1:
            second.set()
        return number

    results = work_ahead(work, range(3), 1)
    assert next(results) == 0
    assert second.wait(5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_reaches_the_caller_and_ends_the_work(num_workers):
    done = []

    def work(number):
        if number == 2:
            raise ValueError("third")
        done.append(number)
        return number

    with pytest.raises(ValueError, match="third"):
        list(work_ahead(work, range(100), num_workers))
    assert len(done) < 10


@pytest.mark.parametrize(
    ("found", "num_ranks", "expected"),
    [("cuda", 4, "cuda:1"), ("cuda", 1, "cuda"), ("cuda:3", 4, "cuda:3"), ("cpu", 4, "cpu")],
)
def test_each_process_takes_the_device_of_its_number(monkeypatch, found, num_ranks, expected):
    monkeypatch.setattr(runner, "default_device", lambda name: torch.device(found))
    assert rank_device("", Place(min(3, num_ranks - 1), num_ranks, local_rank=1)) == torch.device(expected)
