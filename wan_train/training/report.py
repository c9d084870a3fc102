"""Alias of `python -m wan_train.training.reporting.report`, kept for existing scripts."""

import sys

from wan_train.training.reporting.report import start

if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
