"""End all processes of a run together: when all have finished, or soon after one of them has failed.

A process that waits in a collective may not notice that another has ended, so each process sends heartbeats through the
rendezvous store and checks those of the others.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from tqdm import tqdm

from wan_train.distributed.groups import Groups, check_product, join_store, launched_device, make_groups
from wan_train.distributed.ranks import find_place
from wan_train.distributed.settings import ParallelSettings
from wan_train.errors import InputError, RunError, Stopped

HEARTBEAT = 2.0  # seconds between heartbeats
HEARTBEAT_TIMEOUT = 40.0  # seconds without a heartbeat before a process counts as lost; the rest end within 1 minute
EXIT_TIMEOUT = 20  # seconds that a process may take to exit
GRACE = 1.0  # seconds that silent processes wait for the one that reports: launchers kill the rest when one exits

_DONE, _LEFT, _FAILED, _HEARTBEAT = "watch/done", "watch/left", "watch/failed", "watch/beat"


@dataclass
class Watch:
    """Heartbeats of this process and of the others, in a thread of its own between `start` and `stop`."""

    store: Store
    rank: int
    num_ranks: int
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to send and check heartbeats."""
        own: Store = self.store.clone()  # type: ignore[attr-defined]  # a connection that no collective blocks
        self._thread = threading.Thread(target=self._look, args=(own,), name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop sending and checking heartbeats."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(EXIT_TIMEOUT)

    def claim(self, code: int) -> bool:
        """Return whether this process is the first to report why all processes end, with this exit code."""
        mine = f"{self.rank} {code}"
        try:
            return self.store.compare_set(_FAILED, "", mine).decode() == mine
        except Exception:  # the store ended with process 0: process 1 reports
            return self.rank <= 1

    def failure(self) -> int | None:
        """Return the exit code of a failed process; None if none has failed."""
        try:
            return _failure(self.store)
        except Exception:
            return None

    def finish(self) -> None:
        """Wait until all processes have called this, then `stop` and `part`."""
        self.store.add(_DONE, 1)
        while self.store.add(_DONE, 0) < self.num_ranks:
            time.sleep(0.05)
        self.stop()
        self.part(self.store)

    def part(self, store: Store) -> None:
        """Release the store.

        Process 0, which hosts the store, waits until the others have released it, for a few heartbeats at most.
        """
        with suppress(Exception):
            left, deadline = store.add(_LEFT, 1), time.monotonic() + 3 * HEARTBEAT
            while self.rank == 0 and left < self.num_ranks and time.monotonic() < deadline:
                time.sleep(0.05)
                left = store.add(_LEFT, 0)

    def find_missing(self) -> list[int]:
        """Return the processes without a heartbeat in three intervals; [0] if the store is unreachable."""
        try:
            before = _heartbeats(self.store, self.num_ranks)
            time.sleep(3 * HEARTBEAT)
            after = _heartbeats(self.store, self.num_ranks)
        except Exception:
            return [0]
        return [rank for rank in range(self.num_ranks) if before[rank] == after[rank] and rank != self.rank]

    def _look(self, store: Store) -> None:
        seen, since, last = [0] * self.num_ranks, [time.monotonic()] * self.num_ranks, time.monotonic()
        while not self._over.wait(HEARTBEAT):
            try:
                store.add(f"{_HEARTBEAT}/{self.rank}", 1)
                heartbeats, code = _heartbeats(store, self.num_ranks), _failure(store)
            except Exception:
                self._end(store, "process 0", 1, speaks=self.rank == 1)
                return
            if code is not None:
                self._end(store, "", code, speaks=False)
                return
            now = time.monotonic()
            if now - last > 5 * HEARTBEAT:  # this process was suspended, so missing heartbeats mean nothing
                since = [now] * self.num_ranks
            last = now
            since = [now if heartbeats[rank] != seen[rank] else since[rank] for rank in range(self.num_ranks)]
            seen = heartbeats
            if silent := [rank for rank in range(self.num_ranks) if now - since[rank] > HEARTBEAT_TIMEOUT]:
                self._end(store, _named(silent), 1, speaks=self.claim(1))
                return

    def _end(self, store: Store, who: str, code: int, *, speaks: bool) -> None:
        """Exit this process, whatever it is doing, unless it ends by itself in time."""
        if self._over.wait(0 if speaks else GRACE):
            return
        if speaks:
            tqdm.write(f"error: {loss_message(who)}", file=sys.stderr)  # above the progress bar
        self.part(store)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def loss_message(who: str) -> str:
    """Return the message for processes that have ended without one."""
    return (
        f"{who} of this run has ended without a message (killed, or out of memory?): stopping all processes. Finished"
        " videos are kept; start again to generate the rest"
    )


@contextmanager
def working_together(settings: ParallelSettings, find_device: Callable[[], torch.device]) -> Iterator[Groups]:
    """Yield the groups of this process; all processes leave the context together.

    The error of a failed process is raised there; the others exit silently with its exit code. This includes InputError
    for settings that do not fit the number of processes.
    """
    place = find_place()
    try:
        check_product(settings, place.num_ranks)
    except InputError:
        if place.rank:  # all processes raise the same error
            _leave_silently(2)
        raise
    if place.num_ranks == 1:
        yield make_groups(settings, find_device())
        return
    watch = Watch(join_store(place), place.rank, place.num_ranks)
    watch.start()
    try:
        yield make_groups(settings, launched_device(find_device()), watch.store)
        watch.finish()
    except BaseException as problem:
        # Upper bound for processes that still wait in a collective.
        faulthandler.dump_traceback_later(EXIT_TIMEOUT + 6 * HEARTBEAT, exit=True)
        _leave(watch, problem)
        raise
    dist.destroy_process_group()


def _leave(watch: Watch, problem: BaseException) -> None:
    """Raise the problem in the first process that fails; the others exit silently with its exit code."""
    lost = isinstance(problem, Exception) and is_loss(problem)
    code = watch.failure()
    missing = watch.find_missing() if lost and code is None else []
    code = watch.failure() if code is None else code
    speaks = code is None and watch.claim(_code_of(problem))
    code = watch.failure() if code is None else code
    watch.stop()
    watch.part(watch.store)
    if not speaks:
        _leave_silently(code or 1)
    if lost:
        raise RunError(loss_message(_named(missing) if missing else "a process")) from None


def _leave_silently(code: int) -> None:
    time.sleep(GRACE)
    raise SystemExit(code)


def is_loss(problem: Exception) -> bool:
    """Return whether an error means that communication with other processes was lost."""
    text = str(problem).lower()
    return isinstance(problem, dist.DistError) or (
        isinstance(problem, RuntimeError)
        and any(name in text for name in ("gloo", "nccl", "connection closed by peer"))
    )


def _code_of(problem: BaseException) -> int:
    """Return the exit code of a problem, as in `wan_train.cli.run` and Python."""
    if isinstance(problem, InputError):
        return 2
    if isinstance(problem, Stopped):
        return problem.code
    return 130 if isinstance(problem, KeyboardInterrupt) else 1


def _named(ranks: list[int]) -> str:
    return f"process {ranks[0]}" if len(ranks) == 1 else f"one of the processes {', '.join(map(str, ranks))}"


def _heartbeats(store: Store, num_ranks: int) -> list[int]:
    return [store.add(f"{_HEARTBEAT}/{rank}", 0) for rank in range(num_ranks)]


def _failure(store: Store) -> int | None:
    """Return the exit code of the first failed process; None if none has failed."""
    if not store.check([_FAILED]):
        return None
    said = store.get(_FAILED).decode()
    return int(said.split()[1]) if said else None
