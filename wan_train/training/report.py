"""The name that `python -m wan_train.training.reporting.report` had, for the scripts that use it."""

import sys

from wan_train.training.reporting.report import start

if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
