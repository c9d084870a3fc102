"""Stop a run on SIGTERM or Ctrl-C: finish the current step, save a state, and exit."""

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODES = {int(number): 128 + number for number in SIGNALS}  # as shells report a process that a signal ended


class StopRequest:
    """Context manager that records SIGTERM or Ctrl-C; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal = 0  # number of the signal received, or 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        # Not with the log: its stream may be in the middle of writing a line.
        os.write(2, b"\nasked to stop: finishing the step, then saving\n")


def leave_signals_to_trainer(worker: int) -> None:
    """Ignore stop signals in a data loader worker: the trainer handles a signal to the process group, needs the
    workers' batches to finish its step, and ends them itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
