"""A torch.profiler trace of some steps, with a table of the operators that take the most time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.storage import replacing

# Steps: those before, those that the profiler needs to get going, and those in the trace.
WAIT, WARMUP, ACTIVE = 1, 1, 3
_NUM_ROWS, _NUM_LOGGED = 40, 3  # of the table, and of its operators in the log
_STEP = "ProfilerStep*"  # what torch calls a whole step among the operators

log = get_logger(__name__)


class Profiler:
    """Profiles the steps taken inside the first time that it is entered: `step` is called after each.

    FOLDER/NAME.trace.json.gz is for chrome://tracing or ui.perfetto.dev, FOLDER/NAME.operators.txt a table. With
    `folder` None nothing is done. What cannot be written costs a warning; the steps are computed as without a profile.
    """

    def __init__(self, folder: str | None, name: str) -> None:
        self._folder, self._name = None if folder is None else Path(folder), name
        self._running: profile | None = None
        self._has_written, self._num_steps = False, 0

    def __enter__(self) -> "Profiler":
        if self._folder is not None and self._num_steps == 0:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(
                activities=activities,
                schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._running.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            self._stop()
            if not self._has_written:
                needed = WAIT + WARMUP + 1
                log.warning(
                    "--profile: no trace written: it needs %d steps, and there were %d", needed, self._num_steps
                )

    def step(self) -> None:
        """Tell that a step has been taken."""
        if self._running is None:
            return
        self._num_steps += 1
        self._running.step()
        if self._num_steps == WAIT + WARMUP + ACTIVE:
            self._stop()

    def _stop(self) -> None:
        assert self._running is not None
        running, self._running = self._running, None
        running.stop()

    def _write(self, trace: Any) -> None:
        """Write what is recorded; torch calls this after the last step, and where the run ends before that."""
        if self._has_written or self._num_steps <= WAIT + WARMUP:
            return
        assert self._folder is not None
        self._has_written = True
        events = trace.key_averages()
        on_device = any(event.self_device_time_total for event in events)
        column = "self_device_time_total" if on_device else "self_cpu_time_total"
        paths = [self._folder / f"{self._name}{ending}" for ending in (".trace.json.gz", ".operators.txt")]
        try:
            with replacing(paths[0]) as temporary:
                trace.export_chrome_trace(str(temporary))
            with replacing(paths[1]) as temporary:
                table = events.table(sort_by=column, row_limit=_NUM_ROWS, max_name_column_width=80)
                temporary.write_text(table, encoding="utf-8")
        except (InputError, OSError, RuntimeError) as problem:
            log.warning("--profile: %s", problem)
            return
        log.info("profile: %s and %s; %s", *paths, describe(events, column))


def describe(events: Sequence[Any], column: str) -> str:
    """Name the operators with the most of the time that `column` of the events has, and their shares of it."""
    times = {str(event.key): float(getattr(event, column)) for event in events if event.key != _STEP}
    total = sum(times.values()) or 1.0
    first = sorted(times, key=lambda name: -times[name])[:_NUM_LOGGED]
    return "most time in " + ", ".join(f"{name} {times[name] / total:.0%}" for name in first)
