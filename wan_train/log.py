"""Log lines that do not tear progress bars."""

import logging
import os

from tqdm import tqdm


class _BarHandler(logging.Handler):
    """Writes above whatever bar is on screen, to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        import sys

        tqdm.write(self.format(record), file=sys.stderr)


def set_level(level: int) -> None:
    """Log what is of this level and above."""
    logging.getLogger("wan_train_log").setLevel(level)


def get_logger(name: str) -> logging.Logger:
    """A logger of this project: information and above on the first process, warnings and above on the others."""
    root = logging.getLogger("wan_train_log")
    if not root.handlers:
        handler = _BarHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(handler)
        root.propagate = False
        root.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    return root.getChild(name)
