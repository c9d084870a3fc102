"""Create optimizers by name."""

import ast
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wan_train.cli import nearest
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.packages import load
from wan_train.training.optimizing.adamw8bit import AdamW8bitSR
from wan_train.training.optimizing.one_by_one import StepContext, check_one_by_one, one_by_one
from wan_train.training.optimizing.optimizer_state import comes_from, for_training, is_schedule_free, sets_own_rate
from wan_train.training.optimizing.rounding import check_rounding
from wan_train.training.settings import OptimizerSettings

log = get_logger(__name__)

OptimizerClass = Callable[..., torch.optim.Optimizer]

CPU = torch.device("cpu")
_CHOOSES_KERNEL = {"fused", "foreach", "capturable", "differentiable"}  # arguments of torch's optimizers

WORDS = {"true": True, "false": False, "none": None}
LOW_FOR_PRODIGY = 0.1  # it multiplies the estimated rate; the paper and its authors use 1


@dataclass(frozen=True)
class Source:
    """Module of a class, and the package to install for it."""

    module: str
    name: str
    package: str


SOURCES = {
    "AdamW8bit": Source("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "PagedAdamW8bit": Source("bitsandbytes.optim", "PagedAdamW8bit", "bitsandbytes"),
    "Lion": Source("bitsandbytes.optim", "Lion", "bitsandbytes"),
    "Lion8bit": Source("bitsandbytes.optim", "Lion8bit", "bitsandbytes"),
    "Adafactor": Source("transformers.optimization", "Adafactor", "transformers"),
    "Prodigy": Source("prodigyopt", "Prodigy", "prodigyopt"),
    "CAME": Source("came_pytorch", "CAME", "came-pytorch"),
    "AdamWScheduleFree": Source("schedulefree", "AdamWScheduleFree", "schedulefree"),
}
OURS = {"AdamW8bitSR": AdamW8bitSR}
UNUSABLE = ("LBFGS", "SparseAdam")  # of torch: one needs a closure, the other sparse gradients


def make_optimizer(
    groups: list[dict[str, Any]],
    settings: OptimizerSettings,
    *,
    warmup: int = 0,
    step_contexts: Sequence[StepContext] | None = None,
    device: torch.device = CPU,
) -> torch.optim.Optimizer:
    """Create the optimizer of the adapter's parameter groups.

    `warmup` is the number of warmup steps of a schedule-free optimizer. With `step_contexts` it steps one weight at a
    time, within these. `device` is where weights are stepped: on an accelerator torch's AdamW uses its fused kernel,
    unless the arguments choose. See `check_optimizer` for what is refused.
    """
    several = len({group.get("lr", settings.learning_rate) for group in groups}) > 1
    kind, arguments = check_optimizer(settings, several_rates=several)
    if warmup and is_schedule_free(kind):
        arguments["warmup_steps"] = warmup
    _explain(kind, arguments, settings.learning_rate)
    if kind is torch.optim.AdamW and not arguments.keys() & _CHOOSES_KERNEL and can_fuse(device):
        arguments["fused"] = True
    optimizer = (
        kind(groups, **arguments)
        if step_contexts is None
        else one_by_one(kind)(groups, step_contexts=step_contexts, **arguments)
    )
    for_training(optimizer)
    return optimizer


def can_fuse(device: torch.device) -> bool:
    """Return whether torch's fused AdamW runs on a device, by a step on a small weight; False on a CPU, where results
    must not change. Without it torch steps groups of weights (`foreach`) where that is supported."""
    if device.type == "cpu":
        return False
    weight = torch.nn.Parameter(torch.zeros(4, 4, device=device))
    weight.grad = torch.zeros_like(weight)
    try:
        torch.optim.AdamW([weight], fused=True).step()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def check_optimizer(
    settings: OptimizerSettings,
    *,
    several_rates: bool = False,
    rounded: bool = False,
    one_by_one_option: str | None = None,
) -> tuple[OptimizerClass, dict[str, Any]]:
    """Return the optimizer class of the settings and its arguments, including `lr`.

    Raise InputError for an unknown name, a missing package, an argument that the class does not have, and a class that
    does not support what is required: `several_rates` of parameter groups (LoRA+), stochastic rounding (`rounded`), or
    stepping one weight at a time, as the option named by `one_by_one_option` requires.
    """
    kind = find_optimizer(settings.optimizer_type)
    if rounded:
        check_rounding(kind, settings.optimizer_type)
    if one_by_one_option is not None:
        check_one_by_one(kind, settings.optimizer_type, one_by_one_option)
    given = read_arguments("--optimizer_args", settings.optimizer_args)
    if "lr" in given:
        raise InputError("--optimizer_args contains lr: use --learning_rate")
    refuse_unknown("--optimizer_args", given, kind, own=("params", "lr"))
    _check_warmup(kind, given, settings)
    arguments = _defaults(kind, given) | {"lr": settings.learning_rate} | given
    if sets_own_rate(kind, arguments):
        arguments["lr"] = None  # it does not accept both
    if several_rates and (comes_from(kind, "prodigyopt", "Prodigy") or sets_own_rate(kind, arguments)):
        raise InputError(
            f"{settings.optimizer_type} supports a single learning rate, and loraplus_lr_ratio needs two:"
            " leave it out, or use another --optimizer_type"
        )
    try:  # run its own range checks on a temporary parameter
        kind([torch.nn.Parameter(torch.zeros(2, 2))], **arguments)
    except (AssertionError, TypeError, ValueError, RuntimeError) as problem:
        reason = str(problem) or "the learning rate or one of these values is not supported"
        raise InputError(
            f"--optimizer_type {settings.optimizer_type} with --learning_rate {settings.learning_rate:g} and "
            f"--optimizer_args {' '.join(settings.optimizer_args) or '(none)'}: {reason}"
        ) from None
    return kind, arguments


def find_optimizer(name: str) -> OptimizerClass:
    """Return the class of `--optimizer_type`: a known name in any case, a class of torch.optim, or package.Class."""
    if "." in name:
        return _by_full_name(name)
    known: dict[str, Source] = {
        found: Source("torch.optim", found, "torch")
        for found, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and found not in ("Optimizer", *UNUSABLE)
    } | SOURCES
    sources = {found.lower(): source for found, source in known.items()}
    ours: dict[str, OptimizerClass] = {found.lower(): kind for found, kind in OURS.items()}
    if name.lower() in ours:
        return ours[name.lower()]
    if name.lower() not in sources:
        names = [*SOURCES, *OURS, *sorted(known.keys() - SOURCES.keys())]
        raise InputError(
            f"unknown --optimizer_type {name!r}{nearest(name, names)}; known are {', '.join(names)} and any "
            "package.Class"
        )
    source = sources[name.lower()]
    kind: OptimizerClass = load(
        source.module,
        source.name,
        f"--optimizer_type {source.name}",
        package=source.package,
        instead="use --optimizer_type AdamW",
    )
    return kind


def import_class(flag: str, name: str, base: type) -> Any:
    """Import `package.Class`, a subclass of `base`. Raise InputError if it cannot be imported."""
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, OSError, RuntimeError, ValueError) as problem:
        raise InputError(f"{flag} {name}: cannot import {module} ({problem}): install its package") from None
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise InputError(f"{flag} {name}: {module} has no {base.__name__} named {attribute}")
    return kind


def read_arguments(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    """Parse name=value pairs. A value is a Python literal; true, false and none in any case; otherwise text."""
    arguments: dict[str, Any] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not sign or not name:
            raise InputError(f"{flag} takes name=value, not {text!r}")
        if name in arguments:
            raise InputError(f"{flag} contains {name} twice: give it once")
        try:
            arguments[name] = WORDS[value.lower()] if value.lower() in WORDS else ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            arguments[name] = value
    return arguments


def refuse_unknown(
    flag: str, given: dict[str, Any], optimizer_class: Callable[..., Any], *, own: Sequence[str]
) -> None:
    """Raise InputError for an argument that `optimizer_class` does not have, or that is one of our `own`."""
    parameters = inspect.signature(optimizer_class).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.name not in own]
    for name in given:
        if name not in known:
            raise InputError(
                f"{flag}: {getattr(optimizer_class, '__name__', optimizer_class)} has no argument {name}"
                f"{nearest(name, known)}; known are {', '.join(known)}"
            )


def _check_warmup(optimizer_class: OptimizerClass, given: dict[str, Any], settings: OptimizerSettings) -> None:
    if not is_schedule_free(optimizer_class) or settings.lr_warmup_steps.strip(" %") in ("0", "0.0"):
        return
    if "warmup_steps" in given:
        raise InputError("--optimizer_args warmup_steps and --lr_warmup_steps set the same value: give one of them")
    if "warmup_steps" not in inspect.signature(optimizer_class).parameters:
        raise InputError(f"{settings.optimizer_type} has no warm-up: leave out --lr_warmup_steps")


def _defaults(optimizer_class: OptimizerClass, given: dict[str, Any]) -> dict[str, Any]:
    """Return defaults that differ from the package's: Adafactor uses --learning_rate without scaling unless arguments
    say otherwise."""
    relative = bool(given.get("relative_step"))
    adafactor = comes_from(optimizer_class, "transformers", "Adafactor")
    return {"relative_step": relative, "scale_parameter": relative} if adafactor else {}


def _explain(optimizer_class: OptimizerClass, arguments: dict[str, Any], learning_rate: float) -> None:
    if sets_own_rate(optimizer_class, arguments):
        log.warning("Adafactor with relative_step computes its own learning rate: --learning_rate is ignored")
    elif comes_from(optimizer_class, "transformers", "Adafactor") and arguments["scale_parameter"]:
        log.warning("Adafactor with scale_parameter multiplies --learning_rate by the RMS of each weight")
    elif comes_from(optimizer_class, "prodigyopt", "Prodigy") and learning_rate < LOW_FOR_PRODIGY:
        log.warning(
            "Prodigy multiplies the learning rate that it estimates by --learning_rate %g: the usual value is 1",
            learning_rate,
        )


def _by_full_name(name: str) -> OptimizerClass:
    found = import_class("--optimizer_type", name, torch.optim.Optimizer)
    kind: OptimizerClass = found
    closure = inspect.signature(found.step).parameters.get("closure")
    if found.__name__ in UNUSABLE or (closure is not None and closure.default is inspect.Parameter.empty):
        raise InputError(f"--optimizer_type {name} needs a closure or sparse gradients, which are not supported")
    return kind
