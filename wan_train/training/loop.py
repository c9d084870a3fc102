"""The training loop: epochs of steps, and what is due between them."""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from dataset.batching.ahead import read_ahead
from networks.moments import of_epoch, of_step
from wan_train.errors import Stopped
from wan_train.log import get_logger
from wan_train.training.accelerator import from_all
from wan_train.training.carried import Length
from wan_train.training.optimizing.optimizer_state import for_saving
from wan_train.training.reporting.metrics import StepMetrics
from wan_train.training.run import Run, save, save_best, save_stopped
from wan_train.training.saving.state import Position
from wan_train.training.settings import TrainSettings
from wan_train.training.step import take_step, with_draws
from wan_train.training.stopping import EXIT_CODES

log = get_logger(__name__)

Part = TypeVar("Part")


def run_length(batches_per_epoch: int, settings: TrainSettings) -> Length:
    """Steps and epochs of a run. A window of accumulation ends with its epoch."""
    loop = settings.loop
    steps_per_epoch = math.ceil(batches_per_epoch / loop.gradient_accumulation_steps)
    if loop.max_train_epochs is not None:
        return Length(steps_per_epoch * loop.max_train_epochs, loop.max_train_epochs)
    return Length(loop.max_train_steps, math.ceil(loop.max_train_steps / steps_per_epoch))


def train(run: Run) -> None:
    """Train to the end. Raises Stopped, all saved, if a signal asks for it."""
    position = run.start
    with run.stop:
        if position.step == 0:
            before_first_step(run)
        # The bar is closed on every way out, so that an error begins a line of its own.
        with tqdm(
            total=run.length.steps, initial=position.step, desc="steps", disable=not run.accelerator.is_main_process
        ) as bar:
            while position.step < run.length.steps and not has_learnt_enough(run):
                position = train_epoch(run, position, bar)
        evaluate(run, position)
    settings = run.settings.save
    save(run, "", position, with_state=settings.save_state or settings.save_state_on_train_end)


def before_first_step(run: Run) -> None:
    """What a fresh run begins with."""
    evaluate(run, run.start)
    if run.settings.preview.sample_at_first:
        make_previews(run, "e000000", 0)


def train_epoch(run: Run, position: Position, bar: Any) -> Position:
    """Train on from a position to the end of its epoch, or of the run; the position after it, which is within the epoch
    if the run ends there."""
    step, epoch, epoch_step = position.step, position.epoch, position.epoch_step
    size = run.settings.loop.gradient_accumulation_steps
    run.batches.set_epoch(epoch, skip=epoch_step * size)
    for window in windows(read_ahead(with_draws(run, run.loader, position)), size):
        step, epoch_step = step + 1, epoch_step + 1
        position = Position(step, epoch, epoch_step)
        metrics, asked_to_stop = take_step(run, window, position)
        report(run, bar, metrics)
        after_step(run, position)
        if asked_to_stop and step < run.length.steps:
            raise Stopped(save_stopped(run, position), EXIT_CODES[asked_to_stop])
        if step == run.length.steps or has_learnt_enough(run):
            break
    ended = Position(step, epoch + 1, 0)
    after_epoch(run, ended)
    # A run that ends within an epoch may be resumed to go further: from where it is, not from the next epoch.
    return position if 0 < epoch_step < run.epoch_steps else ended


def windows(batches: Iterable[Part], size: int) -> Iterator[list[Part]]:
    """The batches in groups of `size`, the last perhaps smaller."""
    group: list[Part] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def report(run: Run, bar: Any, metrics: StepMetrics) -> None:
    """Show a step on the bar and record it."""
    shown = {"avr_loss": f"{metrics.loss_average:.4f}", "lr": f"{metrics.lr:.2e}", "mem": f"{metrics.memory_mib} MiB"}
    bar.set_postfix(shown, refresh=False)
    bar.update(1)
    if run.writer is not None:
        run.writer.write(metrics)


def after_step(run: Run, position: Position) -> None:
    """What is due after this optimizer step; a state is saved last, so that it knows of all the rest."""
    settings, step = run.settings, position.step
    if is_due(step, settings.validation.validate_every_n_steps):
        evaluate(run, position)
    if is_due(step, settings.save.save_every_n_steps) and step < run.length.steps:
        save(run, of_step(step), position, with_state=settings.save.save_state)
    if is_due(step, settings.preview.sample_every_n_steps):
        make_previews(run, f"{step:06d}", step)


def after_epoch(run: Run, position: Position) -> None:
    """What is due after an epoch, at the beginning of the next; the last is always previewed, and saved under the final
    name alone."""
    settings, epoch = run.settings, position.epoch - 1
    last = position.step >= run.length.steps or has_learnt_enough(run)
    if is_due(epoch, settings.validation.validate_every_n_epochs):
        evaluate(run, position)
    if is_due(epoch, settings.save.save_every_n_epochs) and not last:
        save(run, of_epoch(epoch), position, with_state=settings.save.save_state)
    if is_due(epoch, settings.preview.sample_every_n_epochs) or (last and settings.preview.sample_every_n_epochs):
        make_previews(run, f"e{epoch:06d}", position.step)


def is_due(count: int, every: int | None) -> bool:
    """Whether something that happens every so often happens at this count."""
    return every is not None and count % every == 0


def has_learnt_enough(run: Run) -> bool:
    """Whether `--early_stop` says that going on is in vain."""
    return run.validator is not None and run.validator.should_stop


def evaluate(run: Run, position: Position) -> None:
    """Measure the held-out loss, on all processes together, and keep the adapter if it is the best so far."""
    validator = run.validator
    if validator is None or validator.has_evaluated(position.step):
        return
    with for_saving(run.optimizer):
        evaluation = validator.evaluate(run.dit, run.accelerator, step=position.step)
    if run.writer is not None:
        run.writer.write_row(evaluation.row())
    if evaluation.is_best and position.step > 0:
        save_best(run, position)
    if validator.should_stop:
        log.info("no improvement in %d measurements: stopping early", run.settings.validation.early_stop)


def make_previews(run: Run, moment: str, step: int) -> None:
    """Make the previews, each process its share, and wait for all of them."""
    made: dict[int, Path] = {}
    if run.previewer is not None:
        averaged = run.ema if run.settings.preview.sample_with_ema else None
        applied = averaged.applied(run.stepping.forget) if averaged is not None else nullcontext()
        with for_saving(run.optimizer), applied:
            made = run.previewer.make(run.dit, moment)
    others = {index: path for paths in from_all(made) for index, path in paths.items() if index not in made}
    for _, path in sorted(others.items()):
        log.info("preview %s", path)
    if run.writer is not None and run.previewer is not None:
        run.writer.write_previews(made | others, step, fps=run.previewer.fps)
