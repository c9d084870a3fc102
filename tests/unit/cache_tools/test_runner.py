import threading
import time

import pytest

from cache_tools.runner import work_ahead


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
