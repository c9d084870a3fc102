"""A persistent cache folder for inductor.

The folder contains pickled graphs and compiled code, which torch loads: nobody else may have write access to it.
"""

import os
from pathlib import Path

import torch

from wan_train.storage import check_writable

_HIT, _MISS = "fxgraph_cache_hit", "fxgraph_cache_miss"


def use_cache(folder: str) -> None:
    """Make inductor and triton store their files in a folder, process-wide; call it before anything is compiled.

    Raises InputError for a folder that is not writable.
    """
    check_writable(folder)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).resolve())  # read by torch at each compilation
    torch._inductor.config.fx_graph_cache = True
    torch._functorch.config.enable_autograd_cache = True


def forget_counts() -> None:
    """Reset the hit and miss counters, after a trial run has been compiled."""
    for name in (_HIT, _MISS):
        torch._dynamo.utils.counters["inductor"].pop(name, None)


def describe_use(folder: str) -> str:
    """Return how many graphs were loaded from the folder, and how many were compiled and added, in words."""
    counted = torch._dynamo.utils.counters["inductor"]
    hits, misses = int(counted.get(_HIT, 0)), int(counted.get(_MISS, 0))
    return f"compile cache {folder}: {hits} of {hits + misses} graphs loaded" + (
        f", {misses} compiled and added" if misses else ""
    )
