"""Resume from a state: find it, and check that the configuration matches."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from accelerate import Accelerator
from torch import nn

from dataset.batching.batches import CachedDataset
from dataset.batching.order import SampleKey
from dataset.caching.contents import Contents, changes, read_contents
from dataset.caching.remains import put_back
from dataset.config import DatasetConfig
from wan_train.errors import InputError, Stopped
from wan_train.log import get_logger
from wan_train.models.dit.experts import read_boundary
from wan_train.models.variants import VARIANTS
from wan_train.remote.addresses import shown
from wan_train.remote.folder import RemoteFolder
from wan_train.training.carried import Length, Stateful
from wan_train.training.experts.plan import is_above
from wan_train.training.optimizing.schedules import warmup_steps
from wan_train.training.saving.choosing import choose, identity_of, whole_states
from wan_train.training.saving.earlier import warn_of_others
from wan_train.training.saving.identity import Identity
from wan_train.training.saving.remote_output import (
    fetch_identity,
    fetch_metrics,
    fetch_state,
    fetching,
    remote_states,
    with_remote,
)
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.saving.state import Position, State, differences, load_state, open_state, read_samples
from wan_train.training.settings import TrainSettings

log = get_logger(__name__)

AUTO = "auto"
# Groups of settings that affect a run's results, and their fields that do not or are handled separately below.
GROUPS = ("init", "weights", "network", "loop", "optimizer", "timesteps", "loss", "images", "prior")
INDIFFERENT = {
    "lr_warmup_steps",
    "mixed_precision",
    "prior_captions",
    "max_train_steps",
    "max_train_epochs",
    "gradient_accumulation_steps",
    "max_data_loader_n_workers",
    "ema_cpu",
    "optimizer_cpu_offload",
    "persistent_data_loader_workers",
    "seed",
    "skip_nonfinite",
    "show_timesteps",
}
# Keys of a dataset that affect how its samples are batched, captioned and weighted.
OF_DATASETS = (
    *("batch_size", "num_repeats", "weight", "drop_last", "is_reg", "loss_weight"),
    *("caption_variants", "caption_dropout_rate", "flip_augment", "start_image"),
)
SAMPLES = "samples of the dataset"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run is trained on, and for how long: datasets, samples, captions of `--prior_captions`, optimizer steps,
    and the precision that accelerate chose."""

    configs: Sequence[DatasetConfig]
    keys: Iterable[SampleKey]
    prior_captions: Sequence[str]
    steps: int
    mixed_precision: str


def find_state(settings: TrainSettings, remote: RemoteFolder | None = None) -> State | None:
    """Return the state that `--resume` names; None for a fresh start. Raise InputError for one that is missing or
    incomplete.

    With `remote`, the remote output folder, `--resume auto` considers the states there too, and downloads the one it
    chooses.
    """
    save, wanted = settings.save, settings.save.resume
    if wanted is None:
        return None
    if wanted != AUTO:
        put_back(Path(wanted).absolute().parent)
        state = open_state(Path(wanted))
        if remote is not None:
            with fetching(remote, Path(save.output_dir)):
                fetch_metrics(save, remote, anew=False)
        return state
    put_back(Path(save.output_dir))
    options = _options(settings)

    def fits(state: State) -> bool:
        return not _differences(state.configuration, options, only=options)

    chosen = choose(save, fits) if remote is None else _choose_of_both(save, fits, remote)
    if chosen is None:
        place = save.output_dir if remote is None else shown(remote.url)
        log.info("--resume auto: no state of %s in %s, starting from scratch", save.output_name, place)
    return chosen


def _choose_of_both(save: SaveSettings, fits: Callable[[State], bool], remote: RemoteFolder) -> State | None:
    """Choose the state for `--resume auto` from local and remote states, and download it if it is remote."""
    with fetching(remote, Path(save.output_dir)):
        fetch_identity(save, remote)
        elsewhere = remote_states(save, remote)
        chosen = choose(save, fits, with_remote(whole_states(save, refuse_newer=True), elsewhere))
        if chosen is None:
            return None
        is_elsewhere = any(chosen is state for state in elsewhere)
        state = fetch_state(remote, chosen) if is_elsewhere else chosen
        fetch_metrics(save, remote, anew=is_elsewhere)
    return state


def _options(settings: TrainSettings) -> dict[str, str]:
    """Return the options that affect a run's results, with their values."""
    files = {name: Path(getattr(settings.dit, name)).name for name in ("dit", "motion_controller")}
    known: dict[str, Any] = {"--task": settings.dit.task} | {f"--{name}": file for name, file in files.items()}
    if VARIANTS[settings.dit.task].experts is not None:
        experts = settings.experts
        known |= {
            "--dit_high_noise": Path(experts.dit_high_noise).name,
            "--timestep_boundary": read_boundary(experts.timestep_boundary, VARIANTS[settings.dit.task]),
            "--expert_steps": experts.expert_steps,
            "--shared_lora": experts.shared_lora,
        }
    variant = VARIANTS[settings.dit.task]
    imaged = variant.images is not None or variant.control is not None
    for group in (group for group in GROUPS if group != "images" or imaged):
        values = getattr(settings, group)
        fields = dataclasses.fields(values)
        known |= {f"--{f.name}": getattr(values, f.name) for f in fields if f.name not in INDIFFERENT}
    return {name: str(value) for name, value in known.items()}


def configuration(settings: TrainSettings, trained: Trained, *, num_processes: int) -> dict[str, str]:
    """Return everything that must match for a resumed run to continue like an uninterrupted one, with its values.

    The batches per step must match, but not the number of processes that share them. The length of the run must match
    if the learning rate depends on it.
    """
    known: dict[str, Any] = dict(_options(settings))
    known["--mixed_precision"] = trained.mixed_precision
    known["--lr_warmup_steps"] = warmup_steps(settings.optimizer.lr_warmup_steps, trained.steps)
    known["batches in a step"] = num_processes * settings.loop.gradient_accumulation_steps
    for config in trained.configs:
        known |= {f"{name} of dataset {config.number}": getattr(config, name) for name in OF_DATASETS}
    known[SAMPLES] = _digest(f"{key.item} {key.repeat}" for key in trained.keys)
    known["captions of --prior_captions"] = _digest(trained.prior_captions)
    if settings.optimizer.lr_scheduler not in ("constant", "constant_with_warmup"):
        known["steps of the run"] = trained.steps
    return {name: str(value) for name, value in known.items()}


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def require_same(state: State, current: dict[str, str], samples: Contents, *, anyway: bool) -> None:
    """Raise InputError that lists the differences in configuration, or only log them with `--resume_anyway`. Samples
    are compared by content, if the state records it."""
    different = _differences(state.configuration, current)
    before = read_samples(state)
    if before is not None and (changed := changes(before, samples)):
        # Names are more helpful than the digest of all samples.
        different = [text for text in different if not text.startswith(f"{SAMPLES} was")]
        different += [f"the dataset has {text}" for text in changed]
    if not different:
        return
    listed = "; ".join(different)
    if not anyway:
        raise InputError(
            f"--resume {state.folder} was saved with a different configuration: {listed}. Use the options and the"
            " dataset of the original run, or --resume_anyway"
        )
    log.warning("resuming from %s despite differences: %s", state.folder, listed)


def _differences(saved: dict[str, str], current: dict[str, str], *, only: Iterable[str] | None = None) -> list[str]:
    """List the differences, among the names of `only` if given."""
    if only is not None:
        names = set(only)
        saved = {name: value for name, value in saved.items() if name in names}
    saved = _with_named_experts(saved)
    return differences(saved, current, _defaults([*saved, *current]))


def _with_named_experts(saved: dict[str, str]) -> dict[str, str]:
    """Update a saved configuration as `training.experts.with_named_experts` would: older versions treated a single
    `--dit` as the low-noise expert at any noise levels."""
    try:
        single = bool(saved["--dit"]) and not saved["--dit_high_noise"]
        levels = int(saved["--min_timestep"]), int(saved["--max_timestep"])
        if single and is_above(float(saved["--timestep_boundary"]), *levels):
            return saved | {"--dit": "", "--dit_high_noise": saved["--dit"]}
    except (KeyError, ValueError):
        pass  # a task with a single model
    return saved


def _defaults(names: Iterable[str]) -> dict[str, str]:
    """Return the defaults of these names, as far as they are known."""
    groups = [kind for kind in get_type_hints(TrainSettings).values() if dataclasses.is_dataclass(kind)]
    fields = {f"--{f.name}": f.default for group in groups for f in dataclasses.fields(group)}
    of_dataset = {f.name: f.default for f in dataclasses.fields(DatasetConfig)}
    defaults: dict[str, str] = {}
    for name in names:
        of = re.fullmatch(r"(\w+) of dataset \d+", name)
        default = of_dataset.get(of[1], dataclasses.MISSING) if of else fields.get(name, dataclasses.MISSING)
        if default is not dataclasses.MISSING:
            defaults[name] = str(default)
    return defaults


def chosen_seed(given: int | None, state: State | None) -> int | None:
    """Return the state's seed, which a given seed must equal, or the given one; None if there is neither."""
    if state is None:
        return given
    if given is not None and given != state.seed:
        raise InputError(f"--seed {given} differs from the seed {state.seed} of {state.folder}: leave it out")
    return state.seed


@dataclasses.dataclass(frozen=True)
class Beginning:
    """The start of a run: its position, identity, configuration, and the content of each sample."""

    position: Position
    identity: Identity
    configuration: dict[str, str]
    samples: Contents


def begin(
    settings: TrainSettings,
    state: State | None,
    trained: Trained,
    dataset: CachedDataset,
    length: Length,
    accelerator: Accelerator,
) -> Beginning:
    """Determine how a run starts, afresh or from a state; the first process warns of files that will be replaced. Raise
    the errors of `_position_of`."""
    same = configuration(settings, trained, num_processes=accelerator.num_processes)
    # Needed only to compare with a state or to write one.
    samples = read_contents(dataset) if accelerator.is_main_process or state is not None else {}
    position = _position_of(state, same, samples, length, settings)
    identity = identity_of(state, settings.save)
    if accelerator.is_main_process:
        warn_of_others(settings.save, identity, state)
    return Beginning(position, identity, same, samples)


def _position_of(
    state: State | None, same: dict[str, str], samples: Contents, length: Length, settings: TrainSettings
) -> Position:
    """Return the position where the run starts. Raise InputError for a state with a different configuration, or of a
    run that is finished; with `--resume auto`, as in scripts that restart until done, a finished run raises Stopped
    without an error."""
    if state is None:
        return Position()
    require_same(state, same, samples, anyway=settings.save.resume_anyway)
    if state.position.step >= length.steps:
        told = (
            f"--resume {state.folder} is at step {state.position.step} of {length.steps}: nothing is left to train; "
            "raise --max_train_steps or --max_train_epochs to continue"
        )
        raise Stopped(told, 0) if settings.save.resume == AUTO else InputError(told)
    log.info("resumed from %s at step %d, epoch %d", state.folder, state.position.step, state.position.epoch)
    return state.position


def restore(state: State, trained: dict[str, nn.Parameter], carried: Mapping[str, Stateful]) -> None:
    """Restore the parameters and everything that is carried from step to step."""
    parts = load_state(state, trained)
    for name, part in carried.items():
        if name in parts:
            part.load_state_dict(parts[name])
