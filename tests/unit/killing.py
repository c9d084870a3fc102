"""A job whose process is killed just before it changes the file system for the nth time."""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any


def killed_at(moment: int, changes: Sequence[tuple[Any, str]], job: Callable[[], object]) -> bool:
    """Do a job in a forked process that is killed before the `moment`th call, from 0, of the functions `changes`.

    Each of these is an (owner, name). Return whether the process came to its end.
    """
    child = os.fork()
    if child == 0:
        calls = iter(range(1000))

        def counted(function: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                if next(calls) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return call

        for owner, name in changes:
            setattr(owner, name, counted(getattr(owner, name)))
        try:
            job()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
