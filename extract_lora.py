"""Extract a LoRA from the difference of two checkpoints; `--help` lists the options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from networks.settings import EXTRACT
from wan_train.cli import run

if __name__ == "__main__":
    raise SystemExit(run(EXTRACT))
