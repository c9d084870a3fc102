"""Going on from a state: which one, and whether it is of this configuration."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dataset.config import DatasetConfig
from dataset.order import SampleKey
from wan_train.cli import InputError
from wan_train.log import get_logger
from wan_train.models.experts import read_boundary
from wan_train.models.variants import VARIANTS
from wan_train.training.schedules import warmup_steps
from wan_train.training.settings import TrainSettings
from wan_train.training.state import State, differences, newest_state, open_state

log = get_logger(__name__)

AUTO = "auto"
# What decides the numbers of a run: groups of its settings, and the fields that do not, or are told apart below.
GROUPS = ("weights", "network", "loop", "optimizer", "timesteps", "loss", "pictures", "prior")
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
# The keys of a dataset that decide how its samples are batched, captioned and weighed.
OF_DATASETS = (
    *("batch_size", "num_repeats", "weight", "drop_last", "is_reg", "loss_weight"),
    *("caption_variants", "caption_dropout_rate", "flip_augment"),
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run trains on and for how long: its datasets, its samples, the captions of `--prior_captions`, optimizer
    steps, and the precision that accelerate settled on."""

    configs: Sequence[DatasetConfig]
    keys: Iterable[SampleKey]
    prior_captions: Sequence[str]
    steps: int
    mixed_precision: str


def find_state(settings: TrainSettings) -> State | None:
    """The state that `--resume` names; None for a fresh start. InputError for one that is not there or not whole."""
    wanted = settings.save.resume
    if wanted is None:
        return None
    if wanted != AUTO:
        return open_state(Path(wanted))
    state = newest_state(settings.save)
    if state is None:
        log.info(
            "--resume auto: no state of %s in %s, a fresh start", settings.save.output_name, settings.save.output_dir
        )
    return state


def configuration(settings: TrainSettings, trained: Trained, *, num_processes: int) -> dict[str, str]:
    """What must be the same for a resumed run to go on as the unbroken one would have: option to value.

    The batches of a step count, not how many processes share them; the length of the run counts where the learning rate
    depends on it.
    """
    known: dict[str, Any] = {"--task": settings.dit.task, "--dit": Path(settings.dit.dit).name}
    if VARIANTS[settings.dit.task].experts is not None:
        experts = settings.experts
        known |= {
            "--dit_high_noise": Path(experts.dit_high_noise).name,
            "--timestep_boundary": read_boundary(experts.timestep_boundary, VARIANTS[settings.dit.task]),
            "--expert_steps": experts.expert_steps,
            "--shared_lora": experts.shared_lora,
        }
    pictured = VARIANTS[settings.dit.task].images is not None
    for group in (group for group in GROUPS if group != "pictures" or pictured):
        values = getattr(settings, group)
        fields = dataclasses.fields(values)
        known |= {f"--{f.name}": getattr(values, f.name) for f in fields if f.name not in INDIFFERENT}
    known["--mixed_precision"] = trained.mixed_precision
    known["--lr_warmup_steps"] = warmup_steps(settings.optimizer.lr_warmup_steps, trained.steps)
    known["batches in a step"] = num_processes * settings.loop.gradient_accumulation_steps
    for config in trained.configs:
        known |= {f"{name} of dataset {config.number}": getattr(config, name) for name in OF_DATASETS}
    known["samples of the dataset"] = _digest(f"{key.item} {key.repeat}" for key in trained.keys)
    known["captions of --prior_captions"] = _digest(trained.prior_captions)
    if settings.optimizer.lr_scheduler not in ("constant", "constant_with_warmup"):
        known["steps of the run"] = trained.steps
    return {name: str(value) for name, value in known.items()}


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def require_same(state: State, current: dict[str, str], *, anyway: bool) -> None:
    """InputError that lists what is not as it was, or only a warning if the user wants to go on anyway."""
    different = differences(state.configuration, current)
    if not different:
        return
    listed = "; ".join(different)
    if not anyway:
        raise InputError(
            f"--resume {state.folder} is of another configuration: {listed}. Give the options that the run began with, "
            "or --resume_anyway"
        )
    log.warning("going on from %s although %s", state.folder, listed)


def chosen_seed(given: int | None, state: State | None) -> int | None:
    """The seed to run with: the state's, which a given one must equal; None where nobody says."""
    if state is None:
        return given
    if given is not None and given != state.seed:
        raise InputError(f"--seed {given} is not the {state.seed} that {state.folder} began with: leave it out")
    return state.seed
