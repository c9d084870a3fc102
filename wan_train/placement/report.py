"""Report the memory that a process has used, and release cached memory."""

import gc
import sys
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")


def release_memory() -> None:
    """Release memory that is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_peak(device: torch.device) -> str:
    """Return the peak memory use in words: of the device, if it is a GPU, and of the process."""
    words = f"{peak_host_bytes() / 2**30:.2f} GiB of CPU RAM"
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}, {words}"
    return words


def peak_host_bytes() -> int:
    """Return the peak resident host memory of this process, as reported by the system."""
    try:
        # Preferred to `ru_maxrss`, which on Linux starts at the parent process's peak.
        return int(_STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # not on Windows, which reports the peak through psutil
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
