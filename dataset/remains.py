"""What runs that were killed leave in a cache folder: hidden folders and files, which no reader takes for caches."""

import os
import re
import shutil
import time
from pathlib import Path

from wan_train.file_names import HOST

_TEMPORARY = re.compile(r"\..*\.(?P<host>[\w-]+)~(?P<process>\d+)~\w+")
_PROBE = re.compile(r"\.probe\w{8}")
_DAY = 24 * 60 * 60


def remove_remains(folder: Path) -> list[Path]:
    """Delete the temporaries of runs that are gone, or that are older than a day; say which."""
    removed = []
    for path in folder.iterdir():
        try:
            if path.name.startswith(".") and _is_left_over(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
        except OSError:  # another run was faster, or owns it
            continue
    return removed


def _is_left_over(path: Path) -> bool:
    temporary = _TEMPORARY.fullmatch(path.name)
    if temporary and temporary["host"] == HOST and not _is_alive(int(temporary["process"])):
        return True
    return bool(temporary or _PROBE.fullmatch(path.name)) and time.time() - path.stat().st_mtime > _DAY


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
