"""Clean up what killed runs leave in a folder: hidden folders and files that are never read as caches or states."""

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
    """Complete the replacements of folders that killed processes left unfinished; return the restored paths.

    Only temporaries without a living writer are touched: its process has ended, or it runs on another machine and has
    not written for a minute, far longer than the two renames take.
    """
    found: list[Path] = []
    hidden = [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)] if folder.is_dir() else []
    for temporary in hidden:
        try:
            for old in (temporary / OLD).iterdir():
                new, target = temporary / NEW / old.name, folder / old.name
                # The new one was complete and on disk before the old one was moved.
                if new.exists() and not target.exists() and _is_left_over(temporary, seconds=_MINUTE):
                    new.rename(target)
                    found.append(target)
        except OSError:  # not replacing a folder, handled by another process, or owned by another user
            continue
    return found


def remove_remains(folder: Path) -> list[Path]:
    """Delete temporaries of ended runs and those older than a day; return their paths.

    Folders that were moved aside and not yet replaced are restored first.
    """
    removed = []
    put_back(folder)
    for path in folder.iterdir():
        try:
            if path.name.startswith(".") and _is_left_over(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
        except OSError:  # deleted by another run, or in use by it
            continue
    return removed


def _is_left_over(path: Path, *, seconds: int = _DAY) -> bool:
    """Return whether its process on this machine has ended, or nothing has modified it for `seconds`."""
    temporary = TEMPORARY.fullmatch(path.name)
    if temporary and temporary["host"] == HOST and not _is_alive(int(temporary["process"])):
        return True
    return bool(temporary or _PROBE.fullmatch(path.name)) and time.time() - path.stat().st_mtime > seconds


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # on Windows os.kill may end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # owned by another user
        return True
    return True
