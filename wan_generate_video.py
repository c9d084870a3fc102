"""Generate a video with a Wan model; `--help` lists the options."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # we report a lost process in one line, torch in dozens

from generate.settings import TOOL
from wan_train.cli import run

if __name__ == "__main__":
    raise SystemExit(run(TOOL))
