"""Record the metrics of a run: a row of JSON for each step, trackers, and the progress bar."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_train.errors import RunError
from wan_train.placement.report import peak_host_bytes
from wan_train.storage import replacing
from wan_train.training.reporting.settings import LogSettings
from wan_train.training.reporting.trackers import Guarded, Tracker, Wandb, open_board, uses_board
from wan_train.training.saving.settings import SaveSettings

MEBIBYTE = 2**20
NUM_STRATA = 8


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of an optimizer step: `loss` is the mean over its batches, `seconds` its time, `memory_mib` the peak so
    far.

    `strata` are the losses by eighths of t (`loss_by_stratum`), `learning_rates` those of each parameter group by name,
    with d*lr if the optimizer has a d. `expert` is the trained one of two experts.
    """

    step: int
    epoch: int
    loss: float
    loss_average: float
    lr: float
    grad_norm: float
    seconds: float
    memory_mib: int
    adapter_norm: float | None = None
    tokens_per_second: float | None = None
    strata: Mapping[str, float] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    expert: str | None = None


class MetricsWriter:
    """Writes `NAME.metrics.jsonl` in the output folder, TensorBoard's files and W&B's run.

    A fresh run (`keep_until` None) overwrites the file; a run resumed after step `keep_until` keeps the rows up to it.
    `config` is shown in trackers with `--log_config`. A tracker that fails is disabled with a warning; a row that
    cannot be written raises RunError.
    """

    def __init__(
        self,
        logs: LogSettings,
        save: SaveSettings,
        *,
        keep_until: int | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        self._path = save.metrics_path
        config = config if logs.log_config else None
        kept = [] if keep_until is None else cut_rows(self._path, keep_until)
        self._epoch = EpochMean()
        for row in kept:
            if row.get("loss") is not None:
                self._epoch.add(int(row["epoch"]), float(row["loss"]))
        self._file = self._path.open("w" if keep_until is None else "a", encoding="utf-8")
        self._trackers: list[Tracker] = []
        if uses_board(logs):
            board = open_board(logs, save, keep_until)
            if config:
                board.describe(config)
            self._trackers.append(Guarded(board))
        if logs.log_with in ("wandb", "all"):
            known = next((str(row["wandb_id"]) for row in kept if "wandb_id" in row), None)
            run = Wandb(logs, save, config or {}, known)
            if known is None:
                self.write_row({"step": keep_until or 0, "wandb_id": run.run_id})
            self._trackers.append(Guarded(run))

    def write(self, metrics: StepMetrics) -> None:
        """Record one step. The row is on disk when this returns."""
        row = asdict(metrics)
        row["loss_epoch"] = self._epoch.add(metrics.epoch, metrics.loss)
        self.write_row({name: value for name, value in row.items() if value not in (None, {}, ())})

    def write_row(self, row: Mapping[str, Any]) -> None:
        """Record values by name at `row["step"]`; names in a nested table are prefixed with the table's name."""
        try:
            self._file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as problem:
            raise RunError(f"cannot write {self._path}: {problem.strerror}; files saved earlier are complete") from None
        values = dict(_numbers(row))
        for tracker in self._trackers:
            tracker.scalars(values, int(row["step"]))

    def write_previews(self, paths: Mapping[int, Path], step: int, *, fps: int) -> None:
        """Show previews, by prompt index, in the trackers."""
        named = {f"preview/{index:02d}": path for index, path in sorted(paths.items())}
        for tracker in self._trackers:
            tracker.media(named, step, fps=fps)

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class EpochMean:
    """Mean of the finite losses of an epoch so far."""

    def __init__(self) -> None:
        self._epoch, self._sum, self._count = 0, 0.0, 0

    def add(self, epoch: int, loss: float) -> float | None:
        """Add a loss and return the mean; None before the epoch's first finite loss."""
        if epoch != self._epoch:
            self._epoch, self._sum, self._count = epoch, 0.0, 0
        if math.isfinite(loss):
            self._sum, self._count = self._sum + loss, self._count + 1
        return self._sum / self._count if self._count else None


# Names in rows, and names of curves.
_CURVES = {
    "loss": "loss/current",
    "loss_average": "loss/average",
    "loss_epoch": "loss/epoch",
    "strata": "loss_by_t",
    "learning_rates": "lr",
    "grad_norm": "norm/gradient",
    "adapter_norm": "norm/adapter",
    "seconds": "speed/seconds_per_step",
    "tokens_per_second": "speed/tokens_per_second",
    "memory_mib": "memory/peak_mib",
}


def cut_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Truncate a metrics file to complete rows up to a step, atomically, and return them."""
    rows = [row for row in read_rows(path) if row["step"] <= last_step]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; empty if it is missing. An incomplete last line is skipped."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def loss_by_stratum(t: Tensor, losses: Tensor) -> dict[str, float]:
    """Return the mean of the losses (N,) with t (N,) in each eighth of [0, 1]: `t0` is near data; empty eighths are
    left out."""
    index = (t * NUM_STRATA).long().clamp(0, NUM_STRATA - 1)
    found = sorted(set(index.tolist()))
    return {f"t{stratum}": float(losses[index == stratum].double().mean()) for stratum in found}


def num_tokens(shape: Sequence[int]) -> int:
    """Return the number of DiT tokens of latents (B, C, F, H, W)."""
    batch, _, frames, height, width = shape
    return batch * frames * (height // 2) * (width // 2)


def _finite(value: Any) -> Any:
    """Replace NaN and Inf with null, which JSON can represent."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a row and of its nested tables and lists, by curve name."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in ("step", "epoch"):
                yield from _numbers(part, f"{name}/{key}" if name else str(_CURVES.get(key, key)))
    elif isinstance(value, list | tuple):
        yield from _numbers({str(index): part for index, part in enumerate(value)}, name)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)


def peak_memory_mib(device: torch.device) -> int:
    """Return the peak memory of this process so far: of the device, or resident memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)) // MEBIBYTE
    return peak_host_bytes() // MEBIBYTE
