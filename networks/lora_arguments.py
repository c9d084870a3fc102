"""The `--network_args` of a LoRA."""

import ast
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from networks.settings import NetworkSettings, read_arguments
from wan_train.errors import InputError


@dataclass(frozen=True)
class LoraArguments:
    """The parsed `--network_args`."""

    exclude_patterns: tuple[str, ...] = ()
    include_patterns: tuple[str, ...] = ()
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    loraplus_lr_ratio: float = 1.0
    verbose: bool = False
    conv_dim: int | None = None
    conv_alpha: float | None = None


def lora_arguments(settings: NetworkSettings) -> LoraArguments:
    """Return the arguments of a LoRA. Raises InputError for an unknown key or an invalid value."""
    given = read_arguments(settings, _READERS)
    return LoraArguments(**{key: _READERS[key](key, text) for key, text in given.items()})


def _patterns(key: str, text: str) -> tuple[str, ...]:
    value = _literal(text)
    if isinstance(value, list | tuple) and all(isinstance(pattern, str) for pattern in value):
        return tuple(value)
    raise InputError(
        f"--network_args {key}={text} is not a list of patterns: write \"{key}=['.*ffn.*', '.*cross_attn.*']\""
    )


def _probability(key: str, text: str) -> float:
    value = _number(key, text)
    if not 0 <= value < 1:
        raise InputError(f"--network_args {key}={text} is out of range: must be at least 0 and below 1")
    return value


def _ratio(key: str, text: str) -> float:
    value = _number(key, text)
    if value <= 0:
        raise InputError(f"--network_args {key}={text} is out of range: must be above 0")
    return value


def _whole(key: str, text: str) -> int:
    value = _number(key, text)
    if value != int(value) or value < 1:
        raise InputError(f"--network_args {key}={text} is out of range: must be an integer of 1 or more")
    return int(value)


def _number(key: str, text: str) -> float:
    value = _literal(text)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"--network_args {key}={text} is not a finite number: give one")
    return float(value)


def _switch(key: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise InputError(f"--network_args {key}={text} is not a boolean: give True or False")
    return text.lower() == "true"


def _literal(text: str) -> Any:
    """Return a value in Python notation; None if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # '\d' in a pattern is intended
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None


_READERS: dict[str, Callable[[str, str], Any]] = {
    "exclude_patterns": _patterns,
    "include_patterns": _patterns,
    "rank_dropout": _probability,
    "module_dropout": _probability,
    "loraplus_lr_ratio": _ratio,
    "verbose": _switch,
    "conv_dim": _whole,
    "conv_alpha": _ratio,
}
