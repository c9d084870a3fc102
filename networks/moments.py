"""The names of a run's saved files: NAME-000002 after an epoch, NAME-step00000500 after a step, NAME at the end.

NAME-best is a copy of one of these, and the suffix -ema marks an averaged file. All code that looks for the files of a
run uses this module, so that NAME-2 is a separate run everywhere.
"""

import re

BEST, EMA = "-best", "-ema"
_EPOCH_DIGITS, _STEP_DIGITS = 6, 8


def of_epoch(epoch: int) -> str:
    """Return the suffix of files saved after an epoch, as in NAME-000001."""
    return f"-{epoch:0{_EPOCH_DIGITS}d}"


def of_step(step: int) -> str:
    """Return the suffix of files saved after a step, as in NAME-step00000001."""
    return f"-step{step:0{_STEP_DIGITS}d}"


def _number(digits: int) -> str:
    """Return a pattern for numbers zero-padded to a number of digits, without other spellings."""
    return rf"(?:\d{{{digits}}}|[1-9]\d{{{digits},}})"


EPOCH, STEP = rf"-({_number(_EPOCH_DIGITS)})", rf"-step({_number(_STEP_DIGITS)})"  # the group is the number
MOMENT = rf"(?:-{_number(_EPOCH_DIGITS)}|-step{_number(_STEP_DIGITS)})"


def is_saved_as(text: str, name: str, ending: str = "") -> bool:
    """Return whether `text` is NAME followed by `ending`, with an epoch or step in between or, as at the end of a run,
    without."""
    return re.fullmatch(rf"{re.escape(name)}{MOMENT}?{re.escape(ending)}", text) is not None
