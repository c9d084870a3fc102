"""Names of files while they are written, and whether a file system takes them."""

import errno
import os
import platform
import re
from pathlib import Path

from wan_train.errors import InputError

# Stands in the names of temporary files, so that those of dead processes can be told from those of living ones.
HOST = re.sub(r"[^\w-]", "", platform.node())[:40] or "host"
_NUM_RANDOM = 8  # characters that tempfile adds
# What `hidden_prefix` and tempfile make, and how a file begins that only tries whether a folder can be written to.
TEMPORARY = re.compile(r"\..*\.(?P<host>[\w-]+)~(?P<process>\d+)~\w+")
PROBE = ".probe"


def hidden_prefix(target: Path) -> str:
    """How the hidden folder begins in which a file is written: .STEM.HOST~PROCESS~."""
    # File systems limit a name's bytes, and letters take up to four.
    stem = os.fsencode(target.stem)[:100].decode(errors="ignore")
    return f".{stem}.{HOST}~{os.getpid()}~"


def check_name(path: str | os.PathLike[str], way_out: str) -> None:
    """InputError that ends in the way out if the file system takes no such name, or no such path while it is written.

    Nothing is made; the folders need not be there.
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
    """The text without its middle if it is long, for a message."""
    return text if len(text) <= 100 else f"{text[:60]}…{text[-30:]}"
