"""What the cache tools share: working ahead in threads, and the last line of a run."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def work_ahead(function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int) -> Iterator[Result]:
    """The results of `function` in the order of the tasks, up to `num_workers` of them computed ahead in threads.

    No more than `num_workers` + 1 results are held, and the first error ends the work. Nothing runs ahead with 0.
    """
    if num_workers == 0:
        yield from map(function, tasks)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def summarise_run(what: str, *, num_encoded: int, num_kept: int, num_too_short: int = 0) -> str:
    """The last line of a run."""
    short = f", {num_too_short} files gave no clip (too short)" if num_too_short else ""
    return f"{what}: {num_encoded} encoded, {num_kept} kept{short}"
