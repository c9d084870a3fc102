"""Learning rate schedules, counted in optimizer steps for any number of processes."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from wan_train.cli import nearest
from wan_train.errors import InputError
from wan_train.packages import load
from wan_train.training.optimizing.optimizer_state import is_schedule_free, sets_own_rate
from wan_train.training.optimizing.optimizers import check_optimizer, import_class, read_arguments, refuse_unknown
from wan_train.training.settings import OptimizerSettings

UNKNOWN_LENGTH = 10**12  # used before the length of the run is known; ratios of it are exact
REX_FLOOR = 0.01  # ratio of the learning rate, default of --lr_scheduler_min_lr_ratio

# Settings and decay steps -> arguments of the schedule's function besides the warmup and total steps.
Details = Callable[[OptimizerSettings, int], dict[str, Any]]


def _no_details(settings: OptimizerSettings, decay: int) -> dict[str, Any]:
    return {}


def _waves(settings: OptimizerSettings) -> float:
    """Return the number of cosine periods: each cycle is half a period and ends at the minimum."""
    return settings.lr_scheduler_num_cycles / 2


@dataclass(frozen=True)
class ScheduleKind:
    """The options and --lr_scheduler_args that a schedule reads, and how they are passed to its function."""

    options: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    details: Details = _no_details
    warms_up: bool = True


KINDS: dict[str, ScheduleKind] = {
    "constant": ScheduleKind(),
    "constant_with_warmup": ScheduleKind(),
    "linear": ScheduleKind(),
    "cosine": ScheduleKind(),
    "cosine_with_restarts": ScheduleKind(
        ("lr_scheduler_num_cycles",), details=lambda settings, _: {"num_cycles": settings.lr_scheduler_num_cycles}
    ),
    "polynomial": ScheduleKind(
        ("lr_scheduler_power",), ("lr_end",), details=lambda settings, _: {"power": settings.lr_scheduler_power}
    ),
    "inverse_sqrt": ScheduleKind(
        ("lr_scheduler_timescale",), details=lambda settings, _: {"timescale": settings.lr_scheduler_timescale}
    ),
    "cosine_with_min_lr": ScheduleKind(
        ("lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"),
        details=lambda settings, _: {
            "num_cycles": _waves(settings),
            "min_lr_rate": settings.lr_scheduler_min_lr_ratio,
        },
    ),
    "warmup_stable_decay": ScheduleKind(
        ("lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"),
        ("warmup_type", "decay_type"),
        details=lambda settings, decay: {
            "num_decay_steps": decay,
            "num_cycles": _waves(settings),
            "min_lr_ratio": settings.lr_scheduler_min_lr_ratio or 0.0,
        },
    ),
    "piecewise_constant": ScheduleKind(arguments=("step_rules",), warms_up=False),
    "adafactor": ScheduleKind(warms_up=False),
    "rex": ScheduleKind(
        ("lr_scheduler_min_lr_ratio",),
        ("rex_alpha", "rex_beta"),
        details=lambda settings, _: {
            "floor": REX_FLOOR if settings.lr_scheduler_min_lr_ratio is None else settings.lr_scheduler_min_lr_ratio
        },
    ),
}
NEEDED = {
    "cosine_with_min_lr": (
        "lr_scheduler_min_lr_ratio",
        "give the minimum learning rate as a ratio of the maximum, such as 0.1",
    ),
    "warmup_stable_decay": ("lr_decay_steps", "give the length of the decay, such as 20%"),
}


def warmup_steps(text: str, total: int, flag: str = "--lr_warmup_steps") -> int:
    """Parse a number of steps, a ratio below 1, or a percentage of `total`, given by the option `flag`."""
    try:
        if text.strip().endswith("%"):
            share = float(text.strip()[:-1]) / 100
        else:
            value = float(text)
            if value >= 1 or value == 0:
                if value != int(value):
                    raise ValueError
                share = value / total
            else:
                share = value
        steps = round(share * total)
    except (ValueError, OverflowError):
        raise InputError(f"{flag} takes a number, a ratio below 1 or a percentage, not {text!r}") from None
    if not 0 <= steps <= total:
        raise InputError(f"{flag} {text} is outside the run's {total} steps")
    return steps


def check_schedule(settings: OptimizerSettings, total: int | None = None) -> None:
    """Raise InputError for a schedule that conflicts with other options or whose values are out of range.

    If `total` is None, whatever depends on the length of the run is not checked.
    """
    kind, arguments = check_optimizer(settings)
    own = "adafactor" if sets_own_rate(kind, arguments) else "schedule-free" if is_schedule_free(kind) else ""
    if settings.lr_scheduler == "adafactor" and own != "adafactor":
        raise InputError(
            "--lr_scheduler adafactor needs --optimizer_type Adafactor with --optimizer_args relative_step=True: "
            "otherwise use --learning_rate and any other --lr_scheduler"
        )
    _check_options(settings)
    if own:
        _check_own_pace(settings, own)
        return
    length = total or UNKNOWN_LENGTH
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = _build(torch.optim.SGD([parameter], lr=settings.learning_rate), settings, total=length)
    try:
        for step in (0, 1, length // 2, length):
            [factor(step) for factor in getattr(schedule, "lr_lambdas", ())]
    except (ArithmeticError, TypeError, ValueError) as problem:
        raise InputError(f"{_described(settings)} does not work over {length} steps: {problem}") from None


def make_schedule(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, *, total: int) -> Any:
    """Create the learning rate schedule, to be stepped once for each of the run's `total` optimizer steps.

    The constant schedule with warmup steps warms up too. Optimizers that set their own rate get a schedule without
    effect. The ratios between parameter groups are kept by every schedule of `--lr_scheduler`.
    """
    if is_schedule_free(optimizer) or sets_own_rate(type(optimizer), optimizer.param_groups[0]):
        return LambdaLR(optimizer, _same)
    return _build(optimizer, settings, total=total)


def _same(step: int) -> float:
    return 1.0


def rex_factor(
    step: int, *, warmup: int, total: int, floor: float, rex_alpha: float = 0.1, rex_beta: float = 0.9
) -> float:
    """Return the learning rate at `step` relative to the maximum: REX (Chen et al. 2021, arXiv 2107.04197) above a
    `floor`.

    The paper has alpha = beta = 1/2; musubi-tuner's 0.1 and 0.9 keep the rate high for longer. Warmup is linear from
    the floor.
    """
    if step < warmup:
        return floor + (1 - floor) * step / warmup
    if step >= total:
        return floor
    left = (total - step) / (total - warmup)
    return floor + (1 - floor) * left / (rex_alpha + rex_beta * left)


def _check_own_pace(settings: OptimizerSettings, own: str) -> None:
    """Raise InputError for schedule options with an optimizer that sets its own schedule and would ignore them."""
    if settings.lr_scheduler_type or settings.lr_scheduler not in ("constant", "constant_with_warmup", own):
        raise InputError(
            f"--optimizer_type {settings.optimizer_type} has its own schedule: leave out {_described(settings)}"
        )
    if settings.lr_scheduler_args:
        raise InputError(
            f"--optimizer_type {settings.optimizer_type} has its own schedule: leave out --lr_scheduler_args"
        )
    if own == "adafactor" and warmup_steps(settings.lr_warmup_steps, UNKNOWN_LENGTH):
        raise InputError(
            f"Adafactor with relative_step does not read --lr_warmup_steps {settings.lr_warmup_steps}: leave it out, "
            "or use --optimizer_args relative_step=True warmup_init=True"
        )


def _check_options(settings: OptimizerSettings) -> None:
    """Raise InputError for options that the schedule does not read and would silently ignore."""
    flag, name = _described(settings).split(" ", 1)
    kind = ScheduleKind(warms_up=False) if settings.lr_scheduler_type else KINDS[settings.lr_scheduler]
    if settings.lr_scheduler_type and settings.lr_scheduler != "constant":
        raise InputError(f"--lr_scheduler {settings.lr_scheduler} and {flag} {name} exclude each other: give one")
    if not kind.warms_up and warmup_steps(settings.lr_warmup_steps, UNKNOWN_LENGTH):
        raise InputError(f"{flag} {name} has no warm-up: leave out --lr_warmup_steps {settings.lr_warmup_steps}")
    special = {option for row in KINDS.values() for option in row.options}
    for field in fields(settings):
        changed = getattr(settings, field.name) != field.default
        if field.name in special and changed and field.name not in kind.options:
            readers = ", ".join(name for name, row in KINDS.items() if field.name in row.options)
            raise InputError(f"{flag} {name} does not read --{field.name}: leave it out, or use one of {readers}")
    needed, advice = NEEDED.get(settings.lr_scheduler, ("", ""))
    if needed and getattr(settings, needed) in (None, "0"):
        raise InputError(f"{flag} {name} needs --{needed}: {advice}")


def _build(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, *, total: int) -> Any:
    """Create the schedule. Raise InputError for arguments that its function rejects."""
    given = read_arguments("--lr_scheduler_args", settings.lr_scheduler_args)
    if settings.lr_scheduler_type:
        make = partial(_find_class(settings.lr_scheduler_type), optimizer)
        refuse_unknown("--lr_scheduler_args", given, make.func, own=("optimizer", "last_epoch"))
    else:
        make = partial(_named_schedule, settings, optimizer, total)
        known = KINDS[settings.lr_scheduler].arguments
        for name in given:
            if name not in known:
                listed = f"known are {', '.join(known)}" if known else "there are none"
                raise InputError(
                    f"--lr_scheduler_args: {settings.lr_scheduler} has no argument {name}"
                    f"{nearest(name, known)}; {listed}"
                )
    try:
        return make(**given)
    except (ArithmeticError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as problem:
        if isinstance(problem, InputError):
            raise
        raise InputError(f"{_described(settings)}: {problem}; check --lr_scheduler_args and --learning_rate") from None


def _named_schedule(settings: OptimizerSettings, optimizer: torch.optim.Optimizer, total: int, **given: Any) -> Any:
    from transformers import get_scheduler

    warmup = warmup_steps(settings.lr_warmup_steps, total)
    decay = warmup_steps(settings.lr_decay_steps, total, "--lr_decay_steps")
    if warmup + decay > total:
        raise InputError(f"--lr_warmup_steps {warmup} and --lr_decay_steps {decay} exceed the run's {total} steps")
    name = settings.lr_scheduler
    details = KINDS[name].details(settings, decay) | given
    if name == "rex":
        return LambdaLR(optimizer, partial(rex_factor, warmup=warmup, total=total, **details))
    if name == "piecewise_constant":
        if "step_rules" not in given:
            raise InputError(
                "--lr_scheduler piecewise_constant needs --lr_scheduler_args step_rules=FACTOR:UNTIL,...,FACTOR, such "
                "as step_rules=1:100,0.1:200,0.01"
            )
        asking = "--lr_scheduler piecewise_constant"
        make = load("diffusers.optimization", "get_piecewise_constant_schedule", asking)
        return make(optimizer, str(given["step_rules"]))
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=details
    )


def _find_class(name: str) -> Any:
    known = {
        found: kind
        for found, kind in vars(torch.optim.lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, LRScheduler) and not found.startswith("_")
    }
    if "." not in name and name not in known:
        raise InputError(
            f"unknown --lr_scheduler_type {name!r}{nearest(name, known)}; known are {', '.join(known)} and any "
            "package.Class"
        )
    kind = known[name] if name in known else import_class("--lr_scheduler_type", name, LRScheduler)
    first = list(inspect.signature(kind.step).parameters.values())[1:2]
    if first and first[0].default is inspect.Parameter.empty:
        raise InputError(
            f"--lr_scheduler_type {name} needs {first[0].name} in each step, which training does not provide"
        )
    return kind


def _described(settings: OptimizerSettings) -> str:
    kind = settings.lr_scheduler_type
    return f"--lr_scheduler_type {kind}" if kind else f"--lr_scheduler {settings.lr_scheduler}"
