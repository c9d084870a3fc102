"""Fetch the next batch in a thread while a step works on the current one."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Batch = TypeVar("Batch")

_END = object()


def read_ahead(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of `loader` in order; a thread fetches the next one while the last is in use.

    A DataLoader's workers prefetch too, but receiving what they read still takes milliseconds of the step. An error of
    the loader is raised at the batch where it occurred.
    """
    batches = iter(loader)
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as pool:
        waiting = pool.submit(next, batches, _END)
        while (batch := waiting.result()) is not _END:
            waiting = pool.submit(next, batches, _END)
            yield batch  # type: ignore[misc]
