"""Train a LoRA on a Wan model, or its own weights; `--help` lists the options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from wan_train.cli import run
from wan_train.training.settings import TOOL

if __name__ == "__main__":
    raise SystemExit(run(TOOL))
