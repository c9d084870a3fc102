"""A process of `test_watch.py`: waits in an exchange for one that fails, or works for longer than the others.

python tests/unit/distributed/ended.py RANK input|error|late
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist

from wan_train.distributed.settings import ParallelSettings
from wan_train.distributed.watch import working_together
from wan_train.errors import InputError


def main(rank: str, kind: str) -> int:
    settings = ParallelSettings(data_parallel=int(os.environ["WORLD_SIZE"]))
    try:
        with working_together(settings, lambda: torch.device("cpu")) as groups:
            chosen = groups.place.rank == int(rank)
            if kind == "input" and chosen:
                raise InputError("only here")
            if kind == "error" and chosen:
                raise RuntimeError("out of memory")
            if kind == "late":
                time.sleep(1.0 if chosen else 0.0)
            else:
                dist.barrier()
    except (InputError, RuntimeError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, InputError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
