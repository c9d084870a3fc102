"""What a run says of itself: a line of JSON for every step, TensorBoard, and the progress bar."""

import json
import resource
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wan_train.log import get_logger
from wan_train.training.settings import LogSettings, SaveSettings

log = get_logger(__name__)

MEBIBYTE = 2**20


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step: `loss` is the mean over its batches, `seconds` its time, `memory_mib` the peak so far."""

    step: int
    epoch: int
    loss: float
    loss_average: float
    lr: float
    grad_norm: float
    seconds: float
    memory_mib: int


class RunningMean:
    """Mean of the last `window` values."""

    def __init__(self, window: int = 100) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float:
        """Take in a value and return the mean."""
        self._values.append(value)
        return sum(self._values) / len(self._values)


class MetricsWriter:
    """Writes `NAME.metrics.jsonl` in the output folder, anew for each run, and TensorBoard's files."""

    def __init__(self, logs: LogSettings, save: SaveSettings) -> None:
        folder = Path(save.output_dir)
        self._file = (folder / f"{save.output_name}.metrics.jsonl").open("w", encoding="utf-8")
        self._board = open_board(logs, save) if logs.log_with == "tensorboard" else None

    def write(self, metrics: StepMetrics) -> None:
        """Record one step; the line is on disk when this returns."""
        self._file.write(json.dumps(asdict(metrics)) + "\n")
        self._file.flush()
        if self._board is not None:
            for name in ("loss", "loss_average", "lr", "grad_norm", "seconds"):
                self._board.add_scalar(f"train/{name}", getattr(metrics, name), metrics.step)

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def open_board(logs: LogSettings, save: SaveSettings) -> Any:
    """TensorBoard's writer, or None with a warning where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("the package tensorboard is not installed: curves go to %s.metrics.jsonl alone", save.output_name)
        return None
    return SummaryWriter(str(Path(logs.logging_dir or Path(save.output_dir) / "logs") / save.output_name))


def peak_memory_mib(device: torch.device) -> int:
    """Peak memory of this process so far: the device's, or resident memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)) // MEBIBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
