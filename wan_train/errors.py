"""How a tool ends before its end: the user's mistake, a run that cannot continue, a stop in good order."""

from collections.abc import Mapping


class InputError(ValueError):
    """What the user gave cannot work; the message is one line that names the thing and the way out."""


class RunError(RuntimeError):
    """A run that had begun cannot continue; the message is one line that says where it stopped and what is kept."""


class Stopped(RuntimeError):
    """A run ends in good order before its end, or has nothing to do; the message says how to resume."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code  # for the shell


def first_given(options: Mapping[str, object]) -> str | None:
    """Return the first of these options, by name, that has a value; None if all are empty or off."""
    return next((name for name, value in options.items() if value), None)
