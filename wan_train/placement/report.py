"""How much memory a process has taken, and giving back what nothing holds."""

import gc
import sys
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")


def release_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_peak(device: torch.device) -> str:
    """The most memory so far in words: on the device, if that is a GPU, and of the process."""
    words = f"{peak_host_bytes() / 2**30:.2f} GiB of CPU RAM"
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}, {words}"
    return words


def peak_host_bytes() -> int:
    """The most host memory that this process has had so far, resident, as far as the system tells."""
    try:
        # Before `ru_maxrss`, which on Linux begins with the peak of whoever started this process.
        return int(_STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows has none, and counts peaks itself
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
