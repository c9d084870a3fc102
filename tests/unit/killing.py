"""A job whose process is killed just before it changes the file system for the nth time."""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any


def kill_at(moment: int, changes: Sequence[tuple[Any, str]]) -> None:
    """Let this process be killed before the `moment`th call, from 0, of the functions `changes`, (owner, name) each."""
    calls = iter(range(1000))

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for owner, name in changes:
        setattr(owner, name, counted(getattr(owner, name)))


def killed_at(moment: int, changes: Sequence[tuple[Any, str]], job: Callable[[], object]) -> bool:
    """Do a job in a forked process that `kill_at` kills; return whether the process came to its end.

    The job opens no video: a lock that a thread of FFmpeg held when this process was forked would never be free again.
    """
    child = os.fork()
    if child == 0:
        kill_at(moment, changes)
        try:
            job()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
