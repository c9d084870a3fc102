"""The outcome of a step: its loss and gradient norm, read from the device, and what follows from them.

Where the optimizer itself can skip a step whose loss or gradient is NaN or Inf, nothing in a step depends on values of
the device: they are read after the next step has been launched, so that the device never waits for Python. Otherwise
Python reads them before the optimizer's step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from wan_train.errors import RunError
from wan_train.log import get_logger
from wan_train.placement.transfers import Readback, Timer, can_pin
from wan_train.training.optimizing.optimization import Optimization
from wan_train.training.optimizing.optimizer_state import can_skip
from wan_train.training.reporting.metrics import StepMetrics, loss_by_stratum
from wan_train.training.saving.state import Position

log = get_logger(__name__)


@dataclass(frozen=True)
class Values:
    """Mean loss over all processes, norm of the gradient, losses (N,) of this process's samples, and the stop signal
    received by any process, or 0."""

    loss: float
    norm: float
    samples: Tensor
    signal: int

    @property
    def is_finite(self) -> bool:
        """Whether the step may be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True)
class Measures:
    """The values of a step on the device, float32: `rows` (R, 2) with the loss and the stop signal of each process,
    `samples` (N,) and the gradient's `norm` (), which a fused backward pass has as a number."""

    rows: Tensor
    samples: Tensor
    norm: Tensor | float

    def nonfinite(self) -> Tensor:
        """Return 1.0 if the loss or the gradient is NaN or Inf and 0.0 otherwise, (), on the device."""
        finite = self.rows[:, 0].isfinite().all()
        if isinstance(self.norm, Tensor):
            finite = finite & self.norm.isfinite()
        return 1.0 - finite.float()

    def read(self) -> "Reading":
        """Start copying the values to CPU RAM, together."""
        parts = [self.rows.flatten(), self.samples]
        if isinstance(self.norm, Tensor):
            parts.append(self.norm.float().view(1))
        return Reading(Readback(torch.cat(parts)), len(self.rows), None if isinstance(self.norm, Tensor) else self.norm)


@dataclass(frozen=True)
class Reading:
    """Values of a step on their way to CPU RAM. `norm` is the gradient's norm if it is known already."""

    readback: Readback
    num_processes: int
    norm: float | None

    def values(self) -> Values:
        """Return the values, waiting for them if necessary."""
        flat = self.readback.values()
        rows, rest = flat[: 2 * self.num_processes].view(-1, 2).double(), flat[2 * self.num_processes :]
        norm, samples = (float(rest[-1]), rest[:-1]) if self.norm is None else (self.norm, rest)
        return Values(float(rows[:, 0].mean()), norm, samples, int(rows[:, 1].max()))


def gather_rows(accelerator: Accelerator, loss: Tensor, signal: int) -> Tensor:
    """Return the loss and the stop signal of each process (R, 2) float32 on the device: what all need to agree on."""
    # Filled on the device: a copy of a Python number to it would wait.
    local = torch.stack([loss.float(), torch.full_like(loss, float(signal), dtype=torch.float32)])
    return accelerator.gather(local.unsqueeze(0))


def defers_reading(accelerator: Accelerator, optimizing: Optimization) -> bool:
    """Return whether the values of a step can be read after the next one has been launched.

    The optimizer must skip a nonfinite step by itself, and nothing else may follow the step: the EMA and the limit of
    norms would act on skipped steps, too. A CPU computes while it is called, so there is nothing to wait for.
    """
    plain = optimizing.stepping.fused is None and optimizing.ema is None and optimizing.scale_weight_norms is None
    return can_pin(accelerator.device) and plain and accelerator.scaler is None and can_skip(optimizing.optimizer)


@dataclass(frozen=True)
class Facts:
    """What is known of a step beforehand. `levels` (N,) are the noise levels of its samples, `items` their names;
    `num_tokens` counts those of all processes, and `expert` is the trained one of two."""

    position: Position
    items: Sequence[str]
    levels: Tensor
    num_tokens: int
    expert: str | None


@dataclass(frozen=True)
class Launched:
    """A step that the device is working on or has done. With `is_deferred` its values may not be there yet. `rates` are
    the learning rates by name, `memory_mib` is the peak memory so far."""

    facts: Facts
    reading: Reading
    timer: Timer
    optimizing: Optimization
    rates: dict[str, float]
    memory_mib: int
    adapter_norm: float | None
    is_deferred: bool = False

    def conclude(self) -> tuple[StepMetrics, int]:
        """Return the metrics of the step and the signal that asks to stop after it, or 0; call it once, in the order of
        the steps. Raise RunError if the loss or gradient of too many deferred steps is NaN or Inf."""
        facts, values, average = self.facts, self.reading.values(), self.optimizing.average
        if self.is_deferred and not values.is_finite:
            skip_or_stop(self.optimizing, values, facts)
        seconds, finite = self.timer.seconds(), values.samples.isfinite()
        metrics = StepMetrics(
            step=facts.position.step,
            epoch=facts.position.epoch,
            loss=values.loss,
            loss_average=average.add(values.loss) if math.isfinite(values.loss) else average.mean,
            lr=next(iter(self.rates.values())),
            grad_norm=values.norm,
            seconds=seconds,
            memory_mib=self.memory_mib,
            adapter_norm=self.adapter_norm,
            tokens_per_second=facts.num_tokens / seconds,
            strata=loss_by_stratum(facts.levels[finite], values.samples[finite]),
            learning_rates=self.rates if len(self.rates) > 1 else {},
            expert=facts.expert,
        )
        return metrics, values.signal


def skip_or_stop(optimizing: Optimization, values: Values, facts: Facts) -> None:
    """Count a step skipped because its loss or gradient is NaN or Inf; after `skip_nonfinite` of them raise
    RunError."""
    named = (
        f"the loss is {values.loss}" if not math.isfinite(values.loss) else f"the norm of the gradient is {values.norm}"
    )
    pairs = zip(facts.items[:8], facts.levels.tolist(), strict=False)
    places = ", ".join(f"{item} at t {t:.4f}" for item, t in pairs)
    where = f"{named} at step {facts.position.step}, epoch {facts.position.epoch} ({places})"
    skipped, limit = optimizing.skipped, optimizing.skip_nonfinite
    skipped.count += 1
    taken = "before the step was taken" if optimizing.stepping.fused is None else "with that part of the step left out"
    if skipped.count > limit:
        raise RunError(
            f"{where}: stopped {taken}; files saved earlier are complete. "
            "Lower --learning_rate, check that sample's cache, or skip some steps with --skip_nonfinite"
        )
    log.warning("%s: step skipped (%d of at most %d)", where, skipped.count, limit)
