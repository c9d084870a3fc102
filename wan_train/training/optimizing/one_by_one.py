"""Optimizers that step one weight at a time, to limit temporary memory to that of a single weight.

The optimizers of torch and other packages step all weights at once. A subclass of each passes them one weight at a
time, within the `step_contexts` of that weight, which bring its states to the device or step a float32 copy instead.
Weights are stepped in parts, those of a block or those outside all blocks, so that a part can be stepped once its
gradients are complete.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from wan_train.errors import InputError
from wan_train.training.optimizing.optimizer_state import KERNEL_CHOICES

COUNT = "rounded_steps"  # in the first parameter group, so that a saved state holds it
# By package: optimizers whose step treats weights independently and creates states in a weight's first step.
_ONE_BY_ONE = {
    "torch": ("AdamW", "Adam", "SGD", "Adafactor", "NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "Rprop", "ASGD"),
    "transformers": ("Adafactor",),
    "came_pytorch": ("CAME",),
    "bitsandbytes": ("AdamW8bit", "Lion", "Lion8bit"),
    "wan_train": ("AdamW8bitSR",),
}

StepContext = Callable[[Any, nn.Parameter, str], AbstractContextManager[nn.Parameter]]


@dataclass(frozen=True)
class Part:
    """Weights that are used together. Inside `held` they are on the device, and they are written back on exit."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    held: Callable[[], AbstractContextManager[None]] = nullcontext


def can_step_one_by_one(optimizer_class: Any) -> bool:
    """Return whether an optimizer class can step one weight at a time."""
    return optimizer_class.__name__ in _ONE_BY_ONE.get(optimizer_class.__module__.partition(".")[0], ())


def check_one_by_one(optimizer_class: Any, name: str, flag: str) -> None:
    """Raise InputError for an optimizer class, called `name`, that cannot step one weight at a time as the option
    `flag` requires."""
    if not can_step_one_by_one(optimizer_class):
        known = ", ".join(dict.fromkeys(name for names in _ONE_BY_ONE.values() for name in names))
        raise InputError(
            f"{flag} steps one weight at a time, which --optimizer_type {name} does not support: use one of {known}"
        )


@cache
def one_by_one(optimizer_class: Callable[..., torch.optim.Optimizer]) -> Any:
    """Return a subclass of `optimizer_class` that steps one weight at a time.

    It takes `step_contexts` as an additional argument. Each returns a context manager for the step of one weight, given
    the optimizer, the weight and a key of the step count and the weight's index, and yields the weight to step: the
    same, or a replacement.
    """
    base: Any = optimizer_class

    class OneByOne(base):  # type: ignore[misc]
        param_groups: list[dict[str, Any]]

        def __init__(self, params: Any, *, step_contexts: Iterable[StepContext], **arguments: Any) -> None:
            super().__init__(params, **arguments)
            self.step_contexts = tuple(step_contexts)
            self.param_groups[0][COUNT] = 0
            owned = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
            self._groups = {parameter: group for parameter, group in owned}
            self._places = {parameter: place for place, (parameter, _) in enumerate(owned, 1)}
            self.parts: tuple[Part, ...] = (Part("all", tuple(self._places)),)
            self.home: torch.device | None = None  # device of loaded states; None for CPU RAM
            self.stepped_on: torch.device | None = None  # None for each weight's device

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for part in self.parts:
                if any(parameter.grad is not None for parameter in part.parameters):
                    with part.held():
                        self.step_part(part)
            self.param_groups[0][COUNT] += 1

        @torch.no_grad()
        def step_part(self, part: Part) -> None:
            """Step the weights of a held part that have gradients; `step` counts the step afterwards."""
            for parameter in part.parameters:
                if parameter.grad is not None:
                    with ExitStack() as stack:
                        key = f"{self.param_groups[0][COUNT]}/{self._places[parameter]}"
                        stepped = parameter
                        for turn in self.step_contexts:
                            stepped = stack.enter_context(turn(self, stepped, key))
                        self._step_alone(stepped, self._groups[parameter])

        def _step_alone(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
            groups, together = self.param_groups, group["params"]
            self.param_groups, group["params"] = [group], [parameter]
            try:
                super().step()
            finally:
                self.param_groups, group["params"] = groups, together

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            """Load a state without casting; weights may be on another device until they are stepped."""
            for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
                _load_group(self, group, saved, state["state"])

    OneByOne.__name__, OneByOne.__qualname__ = base.__name__, base.__qualname__
    return OneByOne


def _load_group(optimizer: Any, group: dict[str, Any], saved: Mapping[str, Any], states: Mapping[int, Any]) -> None:
    """Load a saved parameter group and the states of its weights; the choice of kernels stays the optimizer's own."""
    own = {"params", *(name for name in KERNEL_CHOICES if name in group)}
    group.update({name: value for name, value in saved.items() if name not in own})
    for parameter, index in zip(group["params"], saved["params"], strict=True):
        # The fused kernel reads the step count on the device, others in CPU RAM.
        counted_on = (optimizer.stepped_on or parameter.device) if group.get("fused") else None
        optimizer.state[parameter] = {
            name: _own(value, counted_on if name == "step" else optimizer.home)
            for name, value in states.get(index, {}).items()
        }


def _own(value: Any, device: torch.device | None) -> Any:
    """Return a copy of a tensor on a device, or where it is if None."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if device is None else value.to(device, copy=True)
