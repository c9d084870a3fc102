"""The training loop: epochs of optimizer steps, and saving, evaluation and previews between them."""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from dataset.batching.ahead import read_ahead
from networks.moments import of_epoch, of_step
from wan_train.errors import Stopped
from wan_train.log import get_logger
from wan_train.training.accelerator import from_all
from wan_train.training.carried import Length
from wan_train.training.evaluating.validation import Validator
from wan_train.training.experts.models import TrainedModel
from wan_train.training.optimizing.optimization import Optimization
from wan_train.training.optimizing.optimizer_state import for_saving
from wan_train.training.outcome import Launched
from wan_train.training.reporting.metrics import MetricsWriter, StepMetrics
from wan_train.training.run import Reporting, Run
from wan_train.training.saving.save import save, save_best, save_stopped
from wan_train.training.saving.state import Position
from wan_train.training.settings import LoopSettings
from wan_train.training.step import take_step, with_draws
from wan_train.training.stopping import EXIT_CODES

log = get_logger(__name__)

Part = TypeVar("Part")


def run_length(batches_per_epoch: int, loop: LoopSettings) -> Length:
    """Return the optimizer steps and epochs of a run. Gradient accumulation does not cross epochs."""
    steps_per_epoch = math.ceil(batches_per_epoch / loop.gradient_accumulation_steps)
    if loop.max_train_epochs is not None:
        return Length(steps_per_epoch * loop.max_train_epochs, loop.max_train_epochs)
    return Length(loop.max_train_steps, math.ceil(loop.max_train_steps / steps_per_epoch))


def train(run: Run) -> None:
    """Train to the end. Raise Stopped, after saving, if a signal asks for it."""
    position, steps = run.data.start, run.data.length.steps
    hidden = not run.model.accelerator.is_main_process
    with run.stop:
        if position.step == 0:
            before_first_step(run)
        # The bar is closed on every exit, so that an error message starts on a new line.
        with tqdm(total=steps, initial=position.step, desc="steps", disable=hidden) as bar, run.profiler:
            while position.step < steps and not should_stop_early(run.validator):
                position = train_epoch(run, position, bar)
        evaluate(run, position)
    settings = run.saving.settings.save
    keep(run, "", position, with_state=settings.save_state or settings.save_state_on_train_end)


def before_first_step(run: Run) -> None:
    """Evaluate and make the first previews of a fresh run."""
    evaluate(run, run.data.start)
    if run.reporting.preview.sample_at_first:
        make_previews(run.reporting, run.model, run.optimizing, moment="e000000", step=0)


def train_epoch(run: Run, position: Position, bar: Any) -> Position:
    """Train from a position to the end of its epoch or of the run. Return the position reached, which is within the
    epoch if the run ends there."""
    step, epoch, epoch_step = position.step, position.epoch, position.epoch_step
    data, model, steps, size = run.data, run.model, run.data.length.steps, run.data.batches_per_step
    data.batches.set_epoch(epoch, skip=epoch_step * size)
    drawn = with_draws(
        data.loader,
        position,
        objective=run.objective,
        experts=model.experts,
        batches_per_step=size,
        device=model.device,
    )
    with Reports(run.reporting.writer, bar) as reports:
        for window in windows(read_ahead(drawn, device=model.device), size):
            step, epoch_step = step + 1, epoch_step + 1
            position = Position(step, epoch, epoch_step)
            launched = take_step(
                window, position, model=model, optimizing=run.optimizing, objective=run.objective, stop=run.stop
            )
            asked_to_stop = reports.add(launched, at_once=step == steps or is_followed(run, step))
            run.profiler.step()
            after_step(run, position)
            if asked_to_stop and step < steps:
                reports.settle()  # the state includes this step's loss
                told = save_stopped(run.saving, position=position, model=model, optimizing=run.optimizing)
                raise Stopped(told, EXIT_CODES[asked_to_stop])
            if step == steps or should_stop_early(run.validator):
                break
    ended = Position(step, epoch + 1, 0)
    after_epoch(run, ended)
    # A run that ends within an epoch may be extended later: from this position, not from the next epoch.
    return position if 0 < epoch_step < data.epoch_steps else ended


def windows(batches: Iterable[Part], size: int) -> Iterator[list[Part]]:
    """Yield the batches in groups of `size`; the last group may be smaller."""
    group: list[Part] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class Reports:
    """Reports the steps of an epoch in order, each when its values have been read: at once, or when the next step has
    been launched. A context: at its end every step has been reported."""

    def __init__(self, writer: MetricsWriter | None, bar: Any) -> None:
        self._writer, self._bar = writer, bar
        self._waiting: Launched | None = None

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # The step before a failed one has been taken. A device that failed cannot tell of it.
        with suppress(Exception) if error is not None else nullcontext():
            self.settle()

    def add(self, launched: Launched, *, at_once: bool) -> int:
        """Report the step before, and this one too if it is not deferred or `at_once`; return the signal that asks to
        stop, or 0."""
        signal = self.settle()
        self._waiting = launched
        return max(signal, self.settle()) if at_once or not launched.is_deferred else signal

    def settle(self) -> int:
        """Report the launched step, waiting for it; return the signal that asks to stop, or 0."""
        if self._waiting is None:
            return 0
        waiting, self._waiting = self._waiting, None
        metrics, signal = waiting.conclude()
        report(self._writer, self._bar, metrics)
        return signal


def report(writer: MetricsWriter | None, bar: Any, metrics: StepMetrics) -> None:
    """Show a step on the progress bar and record its metrics."""
    shown = {"avr_loss": f"{metrics.loss_average:.4f}", "lr": f"{metrics.lr:.2e}", "mem": f"{metrics.memory_mib} MiB"}
    bar.set_postfix(shown, refresh=False)
    bar.update(1)
    if writer is not None:
        writer.write(metrics)


def is_followed(run: Run, step: int) -> bool:
    """Return whether something reads the run's state after this step: an evaluation, a saved file, previews or, with a
    single process, a stop that was asked for. Several processes agree on a stop one step later."""
    validation = None if run.validator is None else run.validator.settings.validate_every_n_steps
    every = validation, run.saving.settings.save.save_every_n_steps, run.reporting.preview.sample_every_n_steps
    asked = run.model.num_processes == 1 and run.stop.signal != 0
    return asked or any(is_due(step, each) for each in every)


def after_step(run: Run, position: Position) -> None:
    """Evaluate, save and make previews as due after an optimizer step."""
    step, settings, preview = position.step, run.saving.settings.save, run.reporting.preview
    if run.validator is not None and is_due(step, run.validator.settings.validate_every_n_steps):
        evaluate(run, position)
    if is_due(step, settings.save_every_n_steps) and step < run.data.length.steps:
        keep(run, of_step(step), position, with_state=settings.save_state)
    if is_due(step, preview.sample_every_n_steps):
        make_previews(run.reporting, run.model, run.optimizing, moment=f"{step:06d}", step=step)


def after_epoch(run: Run, position: Position) -> None:
    """Evaluate, save and make previews as due after an epoch. The last epoch always gets previews, if they are made by
    epoch, and is saved under the final name only."""
    epoch, settings, preview = position.epoch - 1, run.saving.settings.save, run.reporting.preview
    last = position.step >= run.data.length.steps or should_stop_early(run.validator)
    if run.validator is not None and is_due(epoch, run.validator.settings.validate_every_n_epochs):
        evaluate(run, position)
    if is_due(epoch, settings.save_every_n_epochs) and not last:
        keep(run, of_epoch(epoch), position, with_state=settings.save_state)
    if is_due(epoch, preview.sample_every_n_epochs) or (last and preview.sample_every_n_epochs):
        make_previews(run.reporting, run.model, run.optimizing, moment=f"e{epoch:06d}", step=position.step)


def keep(run: Run, moment: str, position: Position, *, with_state: bool) -> None:
    """Save at a position, under the name of a moment."""
    save(run.saving, moment, position=position, model=run.model, optimizing=run.optimizing, with_state=with_state)


def is_due(count: int, every: int | None) -> bool:
    """Return whether an action that runs every N is due at this count."""
    return every is not None and count % every == 0


def should_stop_early(validator: Validator | None) -> bool:
    """Return whether `--early_stop` asks to stop."""
    return validator is not None and validator.should_stop


def evaluate(run: Run, position: Position) -> None:
    """Measure the validation loss on all processes together, and save the adapter if it is the best so far."""
    validator, model, writer = run.validator, run.model, run.reporting.writer
    if validator is None or validator.has_evaluated(position.step):
        return
    with for_saving(run.optimizing.optimizer):
        evaluation = validator.evaluate(model.dit, model.accelerator, step=position.step)
    if writer is not None:
        writer.write_row(evaluation.row())
    if evaluation.is_best and position.step > 0:
        save_best(run.saving, position=position, model=model, optimizing=run.optimizing)
    if validator.should_stop:
        log.info("no improvement in %d evaluations: stopping early", validator.settings.early_stop)


def make_previews(
    reporting: Reporting, model: TrainedModel, optimizing: Optimization, *, moment: str, step: int
) -> None:
    """Generate this process's share of the previews, and wait for all processes."""
    made: dict[int, Path] = {}
    previewer, writer, mirror = reporting.previewer, reporting.writer, reporting.mirror
    if previewer is not None:
        averaged = optimizing.ema if reporting.preview.sample_with_ema else None
        applied = averaged.applied(optimizing.stepping.forget) if averaged is not None else nullcontext()
        with for_saving(optimizing.optimizer), applied:
            made = previewer.make(model.dit, moment)
    others = {index: path for paths in from_all(made) for index, path in paths.items() if index not in made}
    for _, path in sorted(others.items()):
        log.info("preview %s", path)
    if mirror is not None:
        for path in (made | others).values():
            mirror.upload(path)
    if writer is not None and previewer is not None:
        writer.write_previews(made | others, step, fps=previewer.fps)
