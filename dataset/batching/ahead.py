"""The next batch is fetched while a step works on the one before."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Batch = TypeVar("Batch")

_END = object()


def read_ahead(loader: Iterable[Batch]) -> Iterator[Batch]:
    """What `loader` gives, in its order; a thread takes one more while the last is in use.

    A DataLoader's workers read ahead as well, but what they have read still has to be received, which takes
    milliseconds of the step. An error of the loader is raised in its turn.
    """
    batches = iter(loader)
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as pool:
        waiting = pool.submit(next, batches, _END)
        while (batch := waiting.result()) is not _END:
            waiting = pool.submit(next, batches, _END)
            yield batch  # type: ignore[misc]
