"""How much memory loading a model takes, seen from the process that loads it (Linux)."""

import threading
from collections.abc import Callable
from pathlib import Path

from torch import nn


def tell_peak(warm_up: Callable[[], object], load: Callable[[], nn.Module]) -> None:
    """Print the peak of anonymous memory during `load` as a multiple of the model's bytes, and those bytes.

    `warm_up` runs before: what a first load allocates for good does not count.
    """
    warm_up()
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load()
    done.set()
    watcher.join()
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    print((max(peak, _resident()) - before) / size, size)


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
