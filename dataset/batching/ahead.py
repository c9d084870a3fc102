"""Fetch the next batch in a thread while a step works on the current one."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

CPU = torch.device("cpu")

Batch = TypeVar("Batch")

_END = object()


def read_ahead(loader: Iterable[Batch], *, device: torch.device = CPU) -> Iterator[Batch]:
    """Yield the batches of `loader` in order; a thread fetches the next one while the last is in use.

    A DataLoader's workers prefetch too, but receiving what they read still takes milliseconds of the step. An error of
    the loader is raised at the batch where it occurred. Memory is pinned for copies to `device`, the current one of
    this thread.
    """
    batches = iter(loader)
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead", initializer=_use, initargs=(device,)) as pool:
        waiting = pool.submit(next, batches, _END)
        while (batch := waiting.result()) is not _END:
            waiting = pool.submit(next, batches, _END)
            yield batch  # type: ignore[misc]


def _use(device: torch.device) -> None:
    """Make a device the current one of this thread.

    A new thread begins with the first device. Pinning there, or in the thread that a DataLoader starts for it, every
    rank of a machine would take memory of the first GPU for a context.
    """
    if device.type != "cpu" and device.index is not None:
        torch.get_device_module(device).set_device(device)
