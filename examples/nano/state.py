"""Helpers shared by the pretraining stages: resuming after an interruption, and the log of losses."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wan_train.storage import read_parts, replacing, save_parts


class Trail:
    """A log of losses, with a line of JSON every few steps of a stage: the mean since the line before."""

    def __init__(self, path: Path, every: int = 100) -> None:
        self._path, self._every, self._sum, self._began = path, every, 0.0, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def note(self, stage: str, step: int, loss: float, about: str = "") -> None:
        """Add the loss of a step."""
        self._sum += loss
        if step % self._every == 0:
            minutes = (time.monotonic() - self._began) / 60
            row = {"stage": stage, "step": step, "loss": round(self._sum / self._every, 5), "about": about}
            self.write(row | {"minutes": round(minutes, 2)})
            self._sum = 0.0

    def write(self, row: Mapping[str, object]) -> None:
        """Write a separate line, and print it."""
        line = json.dumps(row)
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor],
    *,
    step: int,
    spent: float,
) -> None:
    """Save everything needed to resume a stage; `spent` is in seconds."""
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": dict(average)}
    with replacing(path) as temporary:
        save_parts(temporary, parts | {"step": step, "spent": spent})


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
) -> tuple[int, float]:
    """Resume from the saved state, if there is one; return the step and the seconds spent."""
    if not path.is_file():
        return 0, 0.0
    parts = read_parts(path)
    model.load_state_dict(parts["model"])
    optimizer.load_state_dict(parts["optimizer"])
    average.update(parts["average"])
    return parts["step"], parts["spent"]
