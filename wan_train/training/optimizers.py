"""Optimizers by the names that users know."""

import ast
import inspect
from collections.abc import Callable
from typing import Any

import torch

from wan_train.cli import InputError, nearest
from wan_train.training.settings import OptimizerSettings

OptimizerClass = Callable[..., torch.optim.Optimizer]


def make_optimizer(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer over parameter groups; see `check_optimizer` for what is refused."""
    kind, arguments = check_optimizer(settings)
    return kind(groups, lr=settings.learning_rate, **arguments)


def check_optimizer(settings: OptimizerSettings) -> tuple[OptimizerClass, dict[str, Any]]:
    """The class and the arguments behind the settings.

    Raises InputError for an unknown name, a package that is not there, or an argument that the class does not take.
    """
    kind = _resolve(settings.optimizer_type)
    known = [name for name in inspect.signature(kind).parameters if name not in ("params", "lr")]
    arguments = dict(_read_argument(text) for text in settings.optimizer_args)
    for name in arguments:
        if name not in known:
            raise InputError(
                f"--optimizer_args: {settings.optimizer_type} takes no {name}{nearest(name, known)}; "
                f"known are {', '.join(known)}"
            )
    try:  # its own checks of ranges, on a parameter that is thrown away
        kind([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate, **arguments)
    except (TypeError, ValueError) as problem:
        raise InputError(f"--optimizer_args for {settings.optimizer_type}: {problem}") from None
    return kind, arguments


def _resolve(name: str) -> OptimizerClass:
    if name.lower() in _SPECIAL:
        return _SPECIAL[name.lower()]()
    known = {
        kind.lower(): getattr(torch.optim, kind)
        for kind in dir(torch.optim)
        if inspect.isclass(getattr(torch.optim, kind))
        and issubclass(getattr(torch.optim, kind), torch.optim.Optimizer)
        and kind not in ("Optimizer", "LBFGS", "SparseAdam")  # these need a closure or sparse gradients
    }
    if name.lower() not in known:
        names = ["AdamW8bit", *sorted(kind.__name__ for kind in known.values())]
        raise InputError(f"unknown --optimizer_type {name!r}{nearest(name, names)}; known are {', '.join(names)}")
    return known[name.lower()]


def _adamw8bit() -> OptimizerClass:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as problem:
        raise InputError(f"AdamW8bit needs the package bitsandbytes ({problem}): install it or take AdamW") from None
    return AdamW8bit


_SPECIAL: dict[str, Callable[[], OptimizerClass]] = {"adamw8bit": _adamw8bit}


def _read_argument(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise InputError(f"--optimizer_args takes name=value, not {text!r}")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return name.strip(), value.strip()
