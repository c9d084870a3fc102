"""Uploads, one at a time, in the order in which they were asked for."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# Seconds before the second and the third try.
WAITS = (1.0, 5.0)


class Uploads:
    """Runs uploads: at once, or in a background thread that `finish` waits for. They must not raise."""

    def __init__(self, *, background: bool) -> None:
        # One at a time: the Hugging Face Hub refuses commits that overlap, and what removes a file comes behind what
        # puts it there.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload") if background else None

    def add(self, upload: Callable[[], None]) -> None:
        """Run it now, or when those before it are done."""
        if self._pool is None:
            upload()
        else:
            self._pool.submit(upload)

    def finish(self) -> None:
        """Wait for all that are under way; Ctrl-C drops those that have not begun."""
        if self._pool is None:
            return
        try:
            self._pool.shutdown(wait=True)
        except KeyboardInterrupt:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise


def retried(call: Callable[[], None], *, pause: Callable[[float], None] = time.sleep) -> None:
    """Call, and again after each of `WAITS` while that raises; what the last try raises is raised."""
    for wait in WAITS:
        try:
            return call()
        except Exception:  # whatever a filesystem or the network raise
            pause(wait)
    call()
