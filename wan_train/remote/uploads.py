"""Run uploads one at a time, in order."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# Seconds before the second and the third attempt.
WAITS = (1.0, 5.0)


class Uploads:
    """Runs uploads immediately, or in a background thread that `finish` waits for. Uploads must not raise."""

    def __init__(self, *, background: bool) -> None:
        # One at a time: the Hugging Face Hub refuses concurrent commits, and a file must be uploaded before it is
        # removed.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload") if background else None

    def add(self, upload: Callable[[], None]) -> None:
        """Run an upload now, or queue it."""
        if self._pool is None:
            upload()
        else:
            self._pool.submit(upload)

    def finish(self) -> None:
        """Wait for all uploads; Ctrl-C drops those that have not started."""
        if self._pool is None:
            return
        try:
            self._pool.shutdown(wait=True)
        except KeyboardInterrupt:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise


def retried(call: Callable[[], None], *, pause: Callable[[float], None] = time.sleep) -> None:
    """Call a function, and again after each of `WAITS` while it raises; the last error is raised."""
    for wait in WAITS:
        try:
            return call()
        except Exception:  # any error of the filesystem or the network
            pause(wait)
    call()
