"""What killed runs leave in a folder: hidden folders and files, which no reader takes for caches or states."""

import os
import re
import shutil
import time
from pathlib import Path

from wan_train.file_names import HOST, PROBE, TEMPORARY
from wan_train.storage import NEW, OLD

_PROBE = re.compile(rf"{re.escape(PROBE)}\w{{8}}")
_MINUTE, _DAY = 60, 24 * 60 * 60


def put_back(folder: Path) -> list[Path]:
    """Finish what a process began that was killed while it replaced a folder in this one; say which are in place again.

    Nobody writes to it any more: the process is gone, or of another machine and has not touched it for a minute, where
    a living one takes no time between the two renames.
    """
    found: list[Path] = []
    hidden = [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)] if folder.is_dir() else []
    for temporary in hidden:
        try:
            for old in (temporary / OLD).iterdir():
                new, target = temporary / NEW / old.name, folder / old.name
                # It was whole and on disk before the old one was moved.
                if new.exists() and not target.exists() and _is_left_over(temporary, seconds=_MINUTE):
                    new.rename(target)
                    found.append(target)
        except OSError:  # it replaces no folder, another process was faster, or it is another user's
            continue
    return found


def remove_remains(folder: Path) -> list[Path]:
    """Delete the temporaries of runs that are gone, or that are older than a day; say which. What one of them had moved
    away, and not yet replaced, is put back first."""
    removed = []
    put_back(folder)
    for path in folder.iterdir():
        try:
            if path.name.startswith(".") and _is_left_over(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
        except OSError:  # another run was faster, or owns it
            continue
    return removed


def _is_left_over(path: Path, *, seconds: int = _DAY) -> bool:
    """Whether a process of this machine that left it is gone, or nobody has touched it for so long."""
    temporary = TEMPORARY.fullmatch(path.name)
    if temporary and temporary["host"] == HOST and not _is_alive(int(temporary["process"])):
        return True
    return bool(temporary or _PROBE.fullmatch(path.name)) and time.time() - path.stat().st_mtime > seconds


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere asking may end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
