"""Helpers shared by the caching scripts: prefetching in threads, and the summary of a run."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from wan_train.distributed.ranks import Place
from wan_train.log import get_logger
from wan_train.precision import accumulate_in_float32, default_device

Task = TypeVar("Task")
Result = TypeVar("Result")


def work_ahead(function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int) -> Iterator[Result]:
    """Yield the results of `function` in the order of the tasks, prefetching up to `num_workers` of them in threads.

    At most `num_workers` + 1 results are held, and the first error stops the work. 0 disables prefetching.
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


def rank_device(name: str, place: Place) -> torch.device:
    """Return the named device or the first available one; with several processes, each uses the device of its local
    rank.

    Matrix products of the process sum in float32 from then on.
    """
    accumulate_in_float32()
    device = default_device(name)
    if device.type == "cpu" or device.index is not None or place.num_ranks == 1:
        return device
    return torch.device(device.type, place.local_rank)


def summarise_run(
    label: str,
    kinds: Mapping[str, int],
    place: Place,
    *,
    num_encoded: int,
    left_out: Mapping[str, int] | None = None,
) -> None:
    """Log the summary of a run: the number of caches by state, and of files left out by reason.

    With several processes, each reports its own share.
    """
    num_kept = kinds.get("up to date", 0) + kinds.get("adopted", 0)
    parts = [f"{num_encoded} encoded", f"{num_kept} kept"]
    parts += [f"{count} {kind}" for kind, count in kinds.items() if count and kind not in ("up to date", "missing")]
    parts += [f"{count} files gave no clip ({why})" for why, count in (left_out or {}).items() if count]
    who = f" (process {place.rank + 1} of {place.num_ranks})" if place.num_ranks > 1 else ""
    summary = get_logger("summary")
    summary.setLevel(logging.INFO)  # processes after the first log nothing else at this level
    summary.info("%s%s: %s", label, who, ", ".join(parts))
