"""How much memory a process has taken, and giving back what nothing holds."""

import gc
import resource
import sys

import torch


def release_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_peak(device: torch.device) -> str:
    """The most memory so far in words: on the device, if that is a GPU, and of the process."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    words = f"{host:.2f} GiB of main memory"
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}, {words}"
    return words
