"""Exceptions that end a tool: invalid input, a failed run, and an orderly stop."""

from collections.abc import Mapping


class InputError(ValueError):
    """Invalid input; the message is one line that names the problem and how to fix it."""


class RunError(RuntimeError):
    """A run failed after it had started; the message is one line that says where it stopped and what is kept."""


class Stopped(RuntimeError):
    """A run stopped in good order, or has nothing to do; the message says how to resume."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code  # for the shell


def first_given(options: Mapping[str, object]) -> str | None:
    """Return the name of the first option with a value; None if all are empty or off."""
    return next((name for name, value in options.items() if value), None)
