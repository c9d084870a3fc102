"""The arguments and results of operators."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among an operator's arguments or results; torch's pytrees take ten times as long."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


def mapped(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Return arguments or results with each tensor replaced by the function of it."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, list | tuple):
        return type(values)([mapped(function, value) for value in values])
    return values


def on_host(value: Any) -> Any:
    """Return the CPU for a device, and any other argument unchanged."""
    return CPU if isinstance(value, torch.device) and value.type != "meta" else value


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that an operator modifies."""
    values = (kwargs.get(name) if index >= len(args) else args[index] for index, name in _written_arguments(func))
    return tensors_in(list(values))


@cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    """Return the position and name of each argument that an operator modifies; of keywords, a position after all."""
    arguments = enumerate(func._schema.arguments)
    return [
        (len(func._schema.arguments) if one.kwarg_only else index, one.name)
        for index, one in arguments
        if one.alias_info is not None and one.alias_info.is_write
    ]
