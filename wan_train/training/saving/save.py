"""Save a run: adapter, EMA and state, under the name of a moment."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dataset.caching.contents import Contents
from networks.adapter import Adapter, trains_weights
from networks.both import lora_settings
from networks.full import Full
from networks.moments import BEST, of_step
from wan_train.errors import InputError, RunError
from wan_train.log import get_logger
from wan_train.remote.mirror import Mirror
from wan_train.shards import entry_of
from wan_train.training.carried import Stateful
from wan_train.training.experts.models import TrainedModel
from wan_train.training.experts.pair import saved_parts
from wan_train.training.experts.plan import only_expert
from wan_train.training.optimizing.ema import reading
from wan_train.training.optimizing.optimization import Optimization
from wan_train.training.optimizing.optimizer_state import for_saving
from wan_train.training.saving.checkpoints import EMA_FILE, FILE, STATE, outlived, path_of, save_adapter, save_weights
from wan_train.training.saving.choosing import newest_of
from wan_train.training.saving.earlier import End, is_of_run, keep_earlier_end
from wan_train.training.saving.hub import Hub
from wan_train.training.saving.identity import Identity
from wan_train.training.saving.metadata import expert_metadata, saved_metadata
from wan_train.training.saving.state import Position, remove, save_state
from wan_train.training.settings import TrainSettings

log = get_logger(__name__)


@dataclass(frozen=True)
class Saving:
    """Information about the run for its files and states, and where to upload them.

    `metadata` are the rows of every file, `configuration` is what a resumed run must match, `samples` the content of
    each sample, and `carried` the parts of a state besides the adapter. `hub` and `mirror`, for a remote output folder,
    exist on the first process only.
    """

    settings: TrainSettings
    seed: int
    identity: Identity
    is_resumed: bool
    epoch_steps: int
    metadata: Mapping[str, str]
    configuration: Mapping[str, str]
    samples: Contents
    carried: Mapping[str, Stateful]
    hub: Hub | None
    mirror: Mirror | None = None


def save(
    saving: Saving,
    moment: str,
    *,
    position: Position,
    model: TrainedModel,
    optimizing: Optimization,
    with_state: bool,
) -> None:
    """Save the adapter, its EMA and, if requested, a state, on the first process; then remove old checkpoints.

    All processes call this together. Raise RunError if something cannot be written.
    """
    if model.accelerator.is_main_process:
        settings, names = saving.settings.save, [name for name, _, _ in saved_parts(model.adapter)]
        saved: list[Path] = []
        if not moment and saving.is_resumed:
            end = End(saving.identity, saving.seed, position, saving.epoch_steps)
            saved = keep_earlier_end(settings, end, names, with_state=with_state)
        with naming_what_is_kept(saving, position):
            saved += write_files(saving, moment, position=position, model=model, optimizing=optimizing)
            if with_state:
                saved.append(keep_state(saving, moment, position=position, model=model))
        is_own = partial(is_of_run, session=saving.identity.session)
        gone = outlived(settings, epoch=epoch_of(position), step=position.step, parts=names, is_own=is_own)
        remove(gone)
        upload(saving, [path for path in saved if path not in gone], gone)
    model.accelerator.wait_for_everyone()


def save_best(saving: Saving, *, position: Position, model: TrainedModel, optimizing: Optimization) -> None:
    """Save the adapter as NAME-best, which is never removed."""
    if model.accelerator.is_main_process:
        with naming_what_is_kept(saving, position):
            saved = write_files(saving, BEST, position=position, model=model, optimizing=optimizing)
        upload(saving, saved)


def save_stopped(saving: Saving, *, position: Position, model: TrainedModel, optimizing: Optimization) -> str:
    """Save a run that was asked to stop; return a message on how to continue."""
    moment = of_step(position.step)
    save(saving, moment, position=position, model=model, optimizing=optimizing, with_state=True)
    folder = path_of(saving.settings.save, moment, STATE)
    return (
        f"stopped after step {position.step}: continue with the same command and --resume {folder} (or --resume auto)"
    )


@contextmanager
def naming_what_is_kept(saving: Saving, position: Position) -> Iterator[None]:
    """Turn a failure to write, for example on a full disk, into RunError that names the state to resume from."""
    try:
        yield
    except InputError as problem:
        last = newest_of(saving.settings.save, saving.identity.session)
        kept = f"; free some space and resume from {last.folder}" if last is not None else ""
        raise RunError(
            f"{problem}; the run stopped at step {position.step}, files saved earlier are complete{kept}"
        ) from None


def upload(saving: Saving, paths: Sequence[Path], gone: Sequence[Path] = ()) -> None:
    """Upload saved files to the hub and the remote output folder, if there are any, and remove `gone` files from the
    folder; the metrics are uploaded too."""
    for path in paths:
        if saving.hub is not None:
            saving.hub.upload(path)
        if saving.mirror is not None:
            saving.mirror.upload(path)
    if saving.mirror is not None:
        saving.mirror.remove(gone)
        saving.mirror.upload_growing()


def write_files(
    saving: Saving, moment: str, *, position: Position, model: TrainedModel, optimizing: Optimization
) -> list[Path]:
    """Write the adapter and its EMA under a moment's name; return their paths."""
    settings = saving.settings.save
    saved: list[Path] = []
    for name, expert, part in saved_parts(model.adapter):
        own = settings_of_part(saving.settings, part)
        write = save_weights if trains_weights(own.network) else save_adapter
        rows = {**saving.metadata, **part.metadata()}
        metadata = saved_metadata(own, rows, step=position.step, epoch=epoch_of(position))
        metadata |= expert_metadata(saving.settings, expert or only_expert(model.experts))
        path = path_of(settings, moment, FILE, name)
        with for_saving(optimizing.optimizer):
            saved += write(path, part.export(), settings, metadata)
        log.info("saved %s", saved[-1])  # the index of a sharded checkpoint
        if optimizing.ema is not None:
            averaged = part.export(reading(optimizing.ema.averages))
            saved += write(path_of(settings, moment, EMA_FILE, name), averaged, settings, metadata)
    return saved


def keep_state(saving: Saving, moment: str, *, position: Position, model: TrainedModel) -> Path:
    """Write a state for resuming from here; return its folder."""
    folder = path_of(saving.settings.save, moment, STATE)
    save_state(
        folder,
        position,
        seed=saving.seed,
        configuration=saving.configuration,
        parameters=model.trained,
        parts={name: part.state_dict() for name, part in saving.carried.items()},
        identity=saving.identity,
        samples=saving.samples,
    )
    log.info("saved the state %s", folder)
    return folder


def final_path(settings: TrainSettings, name: str | None, part: Adapter) -> Path:
    """Return the final file of a part: a LoRA file, or a checkpoint for `--dit`."""
    path = path_of(settings.save, "", FILE, name)
    return entry_of(path) if trains_weights(settings_of_part(settings, part).network) else path


def settings_of_part(settings: TrainSettings, part: Adapter) -> TrainSettings:
    """Return the settings of a run that would train only this part."""
    beside = settings.network.train_also is not None and not isinstance(part, Full)
    return replace(settings, network=lora_settings(settings.network)) if beside else settings


def epoch_of(position: Position) -> int:
    """Return the epoch of the last step."""
    return position.epoch if position.epoch_step else max(1, position.epoch - 1)
