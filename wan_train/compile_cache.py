"""A folder in which inductor keeps what it has compiled, from run to run.

The folder holds pickled graphs and compiled code, which torch loads: it has to be one that nobody else can write to.
"""

import os
from pathlib import Path

import torch

from wan_train.storage import check_writable

_HIT, _MISS = "fxgraph_cache_hit", "fxgraph_cache_miss"


def use_cache(folder: str) -> None:
    """Have inductor, and triton below it, keep their files in a folder; for the process, before anything is compiled.
    InputError for a folder that cannot be written to."""
    check_writable(folder)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).resolve())  # torch reads it whenever it compiles
    torch._inductor.config.fx_graph_cache = True
    torch._functorch.config.enable_autograd_cache = True


def forget_counts() -> None:
    """Count from here on, as of a run whose trial has been compiled."""
    for name in (_HIT, _MISS):
        torch._dynamo.utils.counters["inductor"].pop(name, None)


def describe_use(folder: str) -> str:
    """Say how many graphs were read from the folder, and how many compiled and added."""
    counted = torch._dynamo.utils.counters["inductor"]
    hits, misses = int(counted.get(_HIT, 0)), int(counted.get(_MISS, 0))
    return f"compile cache {folder}: {hits} of {hits + misses} graphs were in it" + (
        f", {misses} were compiled and added" if misses else ""
    )
