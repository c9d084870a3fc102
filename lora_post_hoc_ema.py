"""Average the LoRA files saved by one run; `--help` lists the options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from networks.settings import AVERAGE
from wan_train.cli import run

if __name__ == "__main__":
    raise SystemExit(run(AVERAGE))
