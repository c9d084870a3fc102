"""Measure row after row in a worker process, within a time budget.

The device is used by the worker alone. Where a row ends that process (a lost context, memory, a hang), the row is
recorded as failed and another worker continues with the next row.
"""

import multiprocessing
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from benchmarks.first_look.records import Records, Refused, Result, missing_rows
from benchmarks.first_look.rows import Options

STARTING = 300.0  # seconds until a worker must have said what it measures
LEAST = 120.0  # seconds that every row may take, if the budget has them
ENDING = 5.0  # seconds that an idle worker has to end
MARGIN = 4.0  # times its estimate that a row may take


class Worker:
    """A process that measures; `machine` describes its device, `rows` are names with estimates in seconds."""

    def __init__(self, options: Options) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_serve, args=(options, theirs), daemon=True)
        self._process.start()
        theirs.close()
        hello = self._receive(STARTING) or {"refused": "the process that measures did not start: see its error above"}
        if "refused" in hello:
            self.stop()
            raise Refused(hello["refused"])
        self.machine: Mapping[str, Any] = hello["machine"]
        self.rows: Mapping[str, float] = hello["rows"]

    def measure(self, name: str, earlier: Mapping[str, Result], limit: float) -> Result | None:
        """Return the result of a row, or None if there is none after `limit` seconds or the process has ended."""
        with suppress(OSError):
            self._pipe.send((name, dict(earlier)))
            found: Result | None = self._receive(limit)
            return found
        return None

    @property
    def exit_code(self) -> int | None:
        """The exit code of the process, negative for a signal; None while it runs."""
        self._process.join(1.0)
        return self._process.exitcode

    def stop(self) -> None:
        """End the process: by itself if it waits for a row, by force if it is busy or lost."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(ENDING)
        self._process.kill()
        self._process.join()

    def _receive(self, limit: float) -> Any:
        try:
            return self._pipe.recv() if self._pipe.poll(limit) else None
        except EOFError:
            return None


def _serve(options: Options, pipe: Connection) -> None:
    from benchmarks.first_look.worker import serve  # with torch, which the supervising process does not need

    serve(options, pipe)


def supervise(options: Options, records: Records, *, seconds: float) -> None:
    """Measure the rows that the file lacks, for at most that time. Raise Refused for a device that is
    not there, a file of another machine, and rows that do not exist."""
    deadline = time.monotonic() + seconds
    first = Worker(options)
    worker: Worker | None = first
    try:
        records.check_machine(first.machine)
        estimates = first.rows
        for name in missing_rows(list(estimates), records.latest()):
            left = deadline - time.monotonic()
            if estimates[name] > left:
                _record(records, name, "skipped", f"about {estimates[name]:.0f} s, and {max(left, 0):.0f} s are left")
                continue
            worker = worker or Worker(options)
            limit = min(left, max(LEAST, MARGIN * estimates[name]))
            result = worker.measure(name, records.latest(), limit)
            usable = result is not None and not result.pop("lost", False)
            if result is not None:
                _add(records, result)
            else:
                _record(records, name, *_ending(worker, limit, in_time=limit < left))
            if not usable:
                worker.stop()
                worker = None
    finally:
        if worker is not None:
            worker.stop()


def _ending(worker: Worker, limit: float, *, in_time: bool) -> Sequence[str]:
    """Return the status and the reason of a row without a result."""
    if (code := worker.exit_code) is not None:
        return "failed", f"the process ended with exit code {code}"
    return ("failed", f"no result after {limit:.0f} s") if in_time else ("skipped", "the time was up during this row")


def _record(records: Records, name: str, status: str, reason: str) -> None:
    _add(records, {"row": name, "status": status, "reason": reason})


def _add(records: Records, result: Result) -> None:
    records.add(result)
    told = {name: value for name, value in result.items() if name not in ("row", "status")}
    words = ", ".join(f"{name} {_short(value)}" if name != "reason" else str(value) for name, value in told.items())
    print(f"{result['status']:7} {result['row']}: {words}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
