"""Names of temporary files, and checks whether a file system accepts a name."""

import errno
import os
import platform
import re
from pathlib import Path

from wan_train.errors import InputError

# Part of the names of temporary files, to distinguish those of ended processes.
HOST = re.sub(r"[^\w-]", "", platform.node())[:40] or "host"
_NUM_RANDOM = 8  # characters that tempfile adds
# Names made by `hidden_prefix` and tempfile, and the prefix of files that test whether a folder is writable.
TEMPORARY = re.compile(r"\..*\.(?P<host>[\w-]+)~(?P<process>\d+)~\w+")
PROBE = ".probe"


def hidden_prefix(target: Path) -> str:
    """Return the prefix of the hidden folder in which a file is written: .STEM.HOST~PROCESS~."""
    # File systems limit names in bytes, and a character takes up to four.
    stem = os.fsencode(target.stem)[:100].decode(errors="ignore")
    return f".{stem}.{HOST}~{os.getpid()}~"


def check_name(path: str | os.PathLike[str], way_out: str) -> None:
    """Raise InputError, ending in `way_out`, if the file system rejects the name or the temporary path used to write
    it.

    Nothing is created; the folders need not exist.
    """
    target = Path(path)
    hidden = hidden_prefix(target) + "x" * _NUM_RANDOM
    folder, names = target.parent, [hidden, target.name]
    while not os.path.isdir(folder) and folder != folder.parent:
        folder, names = folder.parent, [*names, folder.name]
    for name in reversed(names):
        if _is_too_long(folder / name):
            size = f"the name {shortened(name)} is too long ({len(os.fsencode(name))} bytes)"
            raise InputError(f"cannot write {shortened(str(target))}: {size}; {way_out}")
    if _is_too_long(target.parent / hidden / f"new{target.suffix}"):
        size = f"the path is too long ({len(os.fsencode(target))} bytes)"
        raise InputError(f"cannot write {shortened(str(target))}: {size}; {way_out}")


def _is_too_long(path: Path) -> bool:
    try:
        os.lstat(path)
    except OSError as problem:
        return problem.errno == errno.ENAMETOOLONG
    return False


def shortened(text: str) -> str:
    """Return the text for a message, without its middle if it is long."""
    return text if len(text) <= 100 else f"{text[:60]}…{text[-30:]}"
