"""The training loop."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.ahead import read_ahead
from dataset.batches import Batch
from dataset.epochs import EpochBatches
from networks.adapter import Adapter
from wan_train.cli import RunError
from wan_train.conditions import Conditions
from wan_train.log import get_logger
from wan_train.models.dit import Dit
from wan_train.training.checkpoints import epoch_path, final_path, save_adapter, step_path
from wan_train.training.metadata import saved_metadata
from wan_train.training.metrics import MetricsWriter, RunningMean, StepMetrics, peak_memory_mib
from wan_train.training.objective import Draws, draw, flow_loss
from wan_train.training.preview import Previewer
from wan_train.training.settings import TrainSettings

log = get_logger(__name__)


@dataclass(frozen=True)
class Length:
    """How long a run is: optimizer steps and epochs, the last one perhaps in part."""

    steps: int
    epochs: int


@dataclass(frozen=True)
class Run:
    """Everything that the loop works with.

    `model` is what accelerate made of `dit`; `previewer` and `writer` are there on the first process only.
    """

    settings: TrainSettings
    accelerator: Accelerator
    dit: Dit
    model: nn.Module
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    schedule: Any
    batches: EpochBatches
    loader: DataLoader[Batch]
    length: Length
    seed: int
    metadata: dict[str, str]
    previewer: Previewer | None
    writer: MetricsWriter | None


def run_length(batches_per_epoch: int, settings: TrainSettings) -> Length:
    """Steps and epochs of a run. A window of accumulation ends with its epoch."""
    loop = settings.loop
    steps_per_epoch = math.ceil(batches_per_epoch / loop.gradient_accumulation_steps)
    if loop.max_train_epochs is not None:
        return Length(steps_per_epoch * loop.max_train_epochs, loop.max_train_epochs)
    return Length(loop.max_train_steps, math.ceil(loop.max_train_steps / steps_per_epoch))


def train(run: Run) -> Path:
    """Train to the end and return the path of the final file."""
    average = RunningMean()
    if run.settings.preview.sample_at_first:
        make_previews(run, "e000000")
    step = 0
    # The bar is closed on every way out, so that an error begins a line of its own.
    with tqdm(total=run.length.steps, desc="steps", disable=not run.accelerator.is_main_process) as bar:
        for epoch in range(1, run.length.epochs + 1):
            run.batches.set_epoch(epoch)
            for window in windows(read_ahead(run.loader), run.settings.loop.gradient_accumulation_steps):
                step += 1
                report(run, bar, take_step(run, window, epoch, step, average))
                after_step(run, step, epoch)
                if step == run.length.steps:
                    break
            after_epoch(run, step, epoch)
    path = final_path(run.settings.save)
    save(run, path, step, run.length.epochs)
    return path


def windows(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches in groups of `size`, the last perhaps smaller."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def take_step(run: Run, window: list[Batch], epoch: int, step: int, average: RunningMean) -> StepMetrics:
    """One optimizer step over a window of batches; the loss is the mean over all processes."""
    began, learning_rate = time.perf_counter(), run.schedule.get_last_lr()[0]
    losses, drawn = [], []
    for index, batch in enumerate(window):
        draws = draw(batch.keys, batch.latents.shape[1:], run.settings.timesteps, seed=run.seed, epoch=epoch)
        waits = index + 1 < len(window)
        with run.accelerator.no_sync(run.model) if waits else nullcontext():
            loss = batch_loss(run, batch, draws)
            run.accelerator.backward(loss / len(window))
        losses.append(loss.detach())
        drawn.append(draws)
    local = torch.stack(losses).mean()
    mean = float(run.accelerator.gather(local.view(1)).mean())
    if not math.isfinite(mean):
        raise RunError(non_finite(mean, step, epoch, window, drawn))
    norm = clip(run)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.schedule.step()
    return StepMetrics(
        step=step,
        epoch=epoch,
        loss=mean,
        loss_average=average.add(mean),
        lr=learning_rate,
        grad_norm=norm,
        seconds=time.perf_counter() - began,
        memory_mib=peak_memory_mib(run.accelerator.device),
    )


def batch_loss(run: Run, batch: Batch, draws: Draws) -> torch.Tensor:
    """The loss of one batch, on the device."""
    device = run.accelerator.device
    conditions = Conditions(tuple(batch.context)).to(device)
    placed = Draws(draws.t.to(device), draws.noise.to(device))
    weights = None if batch.weights is None else batch.weights.to(device)
    return flow_loss(run.model, batch.latents.to(device), conditions, placed, weights=weights)


def clip(run: Run) -> float:
    """Clip the gradient as the settings say and return its norm before."""
    limit = run.settings.loop.max_grad_norm or math.inf
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    return float(run.accelerator.clip_grad_norm_(parameters, limit))


def non_finite(loss: float, step: int, epoch: int, window: list[Batch], drawn: list[Draws]) -> str:
    """Where a loss stopped being a number: the samples of the step with their t."""
    places = [
        f"{key.item} at t {float(t):.4f}"
        for batch, draws in zip(window, drawn, strict=True)
        for key, t in zip(batch.keys, draws.t, strict=True)
    ]
    return (
        f"the loss is {loss} at step {step}, epoch {epoch} ({', '.join(places[:8])}): stopped before the step "
        "was taken; files saved before this are whole. Lower --learning_rate, or look at that sample's cache"
    )


def report(run: Run, bar: Any, metrics: StepMetrics) -> None:
    """Show a step on the bar and record it."""
    bar.update(1)
    bar.set_postfix(avr_loss=f"{metrics.loss_average:.4f}", lr=f"{metrics.lr:.2e}", mem=f"{metrics.memory_mib} MiB")
    if run.writer is not None:
        run.writer.write(metrics)


def after_step(run: Run, step: int, epoch: int) -> None:
    """What is due after this optimizer step."""
    settings = run.settings
    if is_due(step, settings.save.save_every_n_steps) and step < run.length.steps:
        save(run, step_path(settings.save, step), step, epoch)
    if is_due(step, settings.preview.sample_every_n_steps):
        make_previews(run, f"{step:06d}")


def after_epoch(run: Run, step: int, epoch: int) -> None:
    """What is due after this epoch; the last is always previewed, and saved under the final name alone."""
    settings, last = run.settings, epoch == run.length.epochs
    if is_due(epoch, settings.save.save_every_n_epochs) and not last:
        save(run, epoch_path(settings.save, epoch), step, epoch)
    if is_due(epoch, settings.preview.sample_every_n_epochs) or (last and settings.preview.sample_every_n_epochs):
        make_previews(run, f"e{epoch:06d}")


def is_due(count: int, every: int | None) -> bool:
    """Whether something that happens every so often happens at this count."""
    return every is not None and count % every == 0


def save(run: Run, path: Path, step: int, epoch: int) -> None:
    """Write the adapter, on the first process."""
    if run.accelerator.is_main_process:
        save_adapter(
            path, run.adapter, run.settings.save, saved_metadata(run.settings, run.metadata, step=step, epoch=epoch)
        )
        log.info("saved %s", path)


def make_previews(run: Run, moment: str) -> None:
    """Make the previews, on the first process, while the others wait."""
    if run.previewer is not None:
        run.previewer.make(run.dit, moment)
    run.accelerator.wait_for_everyone()
