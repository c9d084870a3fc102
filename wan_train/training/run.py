"""What a run is made of, and what of it is saved."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from dataset.batching.batches import Batch
from dataset.batching.epochs import EpochBatches
from dataset.caching.contents import Contents
from networks.adapter import Adapter, trains_weights
from networks.both import lora_settings
from networks.full import Full
from networks.moments import BEST, of_step
from wan_train.errors import InputError, RunError
from wan_train.log import get_logger
from wan_train.models.dit.dit import Dit
from wan_train.shards import entry_of
from wan_train.training.carried import Length, Skipped, Stateful
from wan_train.training.evaluating.validation import Validator
from wan_train.training.experts.pair import PairEma, PairModel, saved_parts
from wan_train.training.experts.plan import ExpertPlan, only_expert
from wan_train.training.objective.prior import Prior
from wan_train.training.objective.strata import Strata
from wan_train.training.optimizing.ema import Ema, reading
from wan_train.training.optimizing.optimizer_state import for_saving
from wan_train.training.optimizing.stepping import Stepping
from wan_train.training.reporting.metrics import MetricsWriter, RunningMean
from wan_train.training.reporting.preview import Previewer
from wan_train.training.saving.checkpoints import EMA_FILE, FILE, STATE, outlived, path_of, save_adapter, save_weights
from wan_train.training.saving.choosing import newest_of
from wan_train.training.saving.earlier import End, is_of_run, keep_earlier_end
from wan_train.training.saving.hub import Hub
from wan_train.training.saving.identity import Identity
from wan_train.training.saving.metadata import expert_metadata, saved_metadata
from wan_train.training.saving.state import Position, remove, save_state
from wan_train.training.settings import TrainSettings
from wan_train.training.stopping import StopRequest

log = get_logger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything that the loop works with.

    `model` is what accelerate made of `dit`, `optimizer` of that of `stepping`; `previewer` is there on processes with
    a share of the previews, `writer` and `hub` on the first process only. `carried` names all that a state holds beside
    the adapter; `configuration` is what a resumed run must have in common.
    """

    settings: TrainSettings
    accelerator: Accelerator
    dit: Dit | PairModel
    experts: ExpertPlan
    model: nn.Module
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    stepping: Stepping
    schedule: Any
    batches: EpochBatches
    loader: DataLoader[Batch]
    length: Length
    start: Position
    seed: int
    metadata: dict[str, str]
    configuration: dict[str, str]
    samples: Contents
    identity: Identity
    previewer: Previewer | None
    writer: MetricsWriter | None
    hub: Hub | None
    validator: Validator | None
    strata: Strata | None
    prior: Prior | None
    ema: Ema | PairEma | None
    average: RunningMean
    skipped: Skipped
    carried: dict[str, Stateful]
    stop: StopRequest = field(default_factory=StopRequest)

    @property
    def num_processes(self) -> int:
        """How many processes take a step together."""
        return int(self.accelerator.num_processes)

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(len(self.batches) / self.settings.loop.gradient_accumulation_steps)

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return dict(self.adapter.named_parameters())


def save(run: Run, moment: str, position: Position, *, with_state: bool) -> None:
    """Write the adapter, its average and, if asked for, a state, on the first process; then drop what is outlived."""
    if run.accelerator.is_main_process:
        settings, names = run.settings.save, [name for name, _, _ in saved_parts(run.adapter)]
        saved: list[Path] = []
        if not moment and run.start.step > 0:
            end = End(run.identity, run.seed, position, run.epoch_steps)
            saved = keep_earlier_end(settings, end, names, with_state=with_state)
        with naming_what_is_kept(run, position):
            saved += write_files(run, moment, position)
            if with_state:
                saved.append(keep_state(run, moment, position))
        is_own = partial(is_of_run, session=run.identity.session)
        gone = outlived(settings, epoch=epoch_of(position), step=position.step, parts=names, is_own=is_own)
        remove(gone)
        upload(run, [path for path in saved if path not in gone])
    run.accelerator.wait_for_everyone()


def save_best(run: Run, position: Position) -> None:
    """Keep the adapter as NAME-best, beside the others; it is never dropped."""
    if run.accelerator.is_main_process:
        with naming_what_is_kept(run, position):
            saved = write_files(run, BEST, position)
        upload(run, saved)


@contextmanager
def naming_what_is_kept(run: Run, position: Position) -> Iterator[None]:
    """Where something cannot be written inside, for want of room say, RunError that names the state to resume from."""
    try:
        yield
    except InputError as problem:
        last = newest_of(run.settings.save, run.identity.session)
        kept = f": resume from {last.folder} once there is room" if last is not None else ""
        raise RunError(
            f"{problem}; the run ends at step {position.step}, what was saved before is whole{kept}"
        ) from None


def upload(run: Run, paths: list[Path]) -> None:
    """Copy what was saved to the hub, if there is one."""
    for path in paths:
        if run.hub is not None:
            run.hub.upload(path)


def write_files(run: Run, moment: str, position: Position) -> list[Path]:
    """Write the adapter and its average under a moment's name; their paths."""
    settings = run.settings.save
    saved: list[Path] = []
    for name, expert, part in saved_parts(run.adapter):
        own = settings_of_part(run.settings, part)
        write = save_weights if trains_weights(own.network) else save_adapter
        metadata = saved_metadata(own, run.metadata | part.metadata(), step=position.step, epoch=epoch_of(position))
        metadata |= expert_metadata(run.settings, expert or only_expert(run.experts))
        path = path_of(settings, moment, FILE, name)
        with for_saving(run.optimizer):
            saved += write(path, part.export(), settings, metadata)
        log.info("saved %s", saved[-1])  # of a set its index
        if run.ema is not None:
            averaged = part.export(reading(run.ema.averages))
            saved += write(path_of(settings, moment, EMA_FILE, name), averaged, settings, metadata)
    return saved


def final_path(run: Run, name: str | None, part: Adapter) -> Path:
    """What the run leaves of a part at its end: a LoRA's file, or what `--dit` takes."""
    path = path_of(run.settings.save, "", FILE, name)
    return entry_of(path) if trains_weights(settings_of_part(run.settings, part).network) else path


def settings_of_part(settings: TrainSettings, part: Adapter) -> TrainSettings:
    """The settings as of a run that trains this part alone."""
    beside = settings.network.train_also is not None and not isinstance(part, Full)
    return replace(settings, network=lora_settings(settings.network)) if beside else settings


def epoch_of(position: Position) -> int:
    """The epoch that the last step belonged to."""
    return position.epoch if position.epoch_step else max(1, position.epoch - 1)


def keep_state(run: Run, moment: str, position: Position) -> Path:
    """Write all that it takes to resume from here; where."""
    folder = path_of(run.settings.save, moment, STATE)
    save_state(
        folder,
        position,
        seed=run.seed,
        configuration=run.configuration,
        parameters=run.trained,
        parts={name: part.state_dict() for name, part in run.carried.items()},
        identity=run.identity,
        samples=run.samples,
    )
    log.info("saved the state %s", folder)
    return folder


def save_stopped(run: Run, position: Position) -> str:
    """Save where a run is that was asked to stop; how to go on, in words."""
    save(run, of_step(position.step), position, with_state=True)
    folder = path_of(run.settings.save, of_step(position.step), STATE)
    return f"stopped after step {position.step}: go on with the same command and --resume {folder} (or --resume auto)"
