"""Flush files to disk, as far as each system supports it."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Flush a file to disk, or a folder's entries if the system supports that."""
    is_folder, on_windows = path.is_dir(), os.name == "nt"
    if is_folder and on_windows:  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)  # Windows needs write access to flush
    try:
        os.fsync(descriptor)
    except OSError:
        if not is_folder:  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)
