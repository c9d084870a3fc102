"""Cache the latents of a dataset's videos and images; `--help` lists the options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cache_tools.settings import LATENTS_TOOL
from wan_train.cli import run

if __name__ == "__main__":
    raise SystemExit(run(LATENTS_TOOL))
