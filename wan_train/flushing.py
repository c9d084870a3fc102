"""Having the disk write down what was written, on each system as far as it can."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Have the disk write down a file, or a folder's names where the system can do that."""
    is_folder, on_windows = path.is_dir(), os.name == "nt"
    if is_folder and on_windows:  # it opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)  # Windows flushes what may be written to
    try:
        os.fsync(descriptor)
    except OSError:
        if not is_folder:  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)
