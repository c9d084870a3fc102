"""When in its run a file was saved, as its name tells: NAME-000002 after an epoch, NAME-step00000500 after a step, NAME
at the end; NAME-best is one of these again, and with -ema behind it a file is the average of that time. Everything that
looks for the files of a run asks here, so that NAME-2 is a run of its own for all of them.
"""

import re

BEST, EMA = "-best", "-ema"
_EPOCH_DIGITS, _STEP_DIGITS = 6, 8


def of_epoch(epoch: int) -> str:
    """How names tell that something was saved after an epoch: NAME-000001."""
    return f"-{epoch:0{_EPOCH_DIGITS}d}"


def of_step(step: int) -> str:
    """How names tell that something was saved after a step: NAME-step00000001."""
    return f"-step{step:0{_STEP_DIGITS}d}"


def _number(digits: int) -> str:
    """A pattern for numbers padded with zeros to a number of digits, and for no other spelling of them."""
    return rf"(?:\d{{{digits}}}|[1-9]\d{{{digits},}})"


EPOCH, STEP = rf"-({_number(_EPOCH_DIGITS)})", rf"-step({_number(_STEP_DIGITS)})"  # the group is the number
MOMENT = rf"(?:-{_number(_EPOCH_DIGITS)}|-step{_number(_STEP_DIGITS)})"


def is_saved_as(text: str, name: str, ending: str = "") -> bool:
    """Whether `text` is NAME and `ending`, with a moment in between or, as at the end of a run, without."""
    return re.fullmatch(rf"{re.escape(name)}{MOMENT}?{re.escape(ending)}", text) is not None
