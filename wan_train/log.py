"""Logging that does not break progress bars."""

import logging
import os
import sys


class _BarHandler(logging.Handler):
    """Writes log lines to stderr above the progress bar; if nothing imported tqdm, there is no bar."""

    def emit(self, record: logging.LogRecord) -> None:
        line, bar = self.format(record), getattr(sys.modules.get("tqdm"), "tqdm", None)
        if bar is None:
            print(line, file=sys.stderr)
        else:
            bar.write(line, file=sys.stderr)


def set_level(level: int) -> None:
    """Set the log level of this project."""
    logging.getLogger("wan_train_log").setLevel(level)


def get_logger(name: str) -> logging.Logger:
    """Return a logger of this project; it logs from INFO on in the first process, from WARNING on in others."""
    root = logging.getLogger("wan_train_log")
    if not root.handlers:
        handler = _BarHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(handler)
        root.propagate = False
        root.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    return root.getChild(name)
