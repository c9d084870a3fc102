"""Optimizers that step one weight after another, so that what a step takes beside it is there for one at a time.

The classes of torch and others take all weights at once. Here each gets a subclass that hands it one, inside of what
the `step_contexts` of a weight do: bring its states to the device, let a float32 copy stand in for it. Weights are
stepped in parts: those of a block, or of what is outside the blocks, so that a part can be stepped as soon as its
gradients are there.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from wan_train.errors import InputError

COUNT = "rounded_steps"  # in the first parameter group, so that a saved state holds it
# By package: those that treat each weight by itself, whatever else there is, and make its states at its first step.
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
    """Weights that are used together. While `held` is entered they are on the device, and written back after it."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    held: Callable[[], AbstractContextManager[None]] = nullcontext


def can_step_one_by_one(optimizer_class: Any) -> bool:
    """Whether the step of an optimizer class can be taken weight by weight."""
    return optimizer_class.__name__ in _ONE_BY_ONE.get(optimizer_class.__module__.partition(".")[0], ())


def check_one_by_one(optimizer_class: Any, name: str, flag: str) -> None:
    """InputError for an optimizer class, called `name`, whose step cannot be taken weight by weight as `flag` asks."""
    if not can_step_one_by_one(optimizer_class):
        known = ", ".join(dict.fromkeys(name for names in _ONE_BY_ONE.values() for name in names))
        raise InputError(f"{flag} steps weight by weight, which --optimizer_type {name} cannot: take one of {known}")


@cache
def one_by_one(optimizer_class: Callable[..., torch.optim.Optimizer]) -> Any:
    """The class that steps as `optimizer_class` does, one weight at a time.

    It takes `step_contexts` besides. Each is a context for the step of one weight. It is given the optimizer, the
    weight and a key that tells the number of steps taken and the weight's place, and gives the weight to step: that
    one, or one that stands in for it.
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
            self.home: torch.device | None = None  # of states that are loaded; without one they stay in CPU RAM

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for part in self.parts:
                if any(parameter.grad is not None for parameter in part.parameters):
                    with part.held():
                        self.step_part(part)
            self.param_groups[0][COUNT] += 1

        @torch.no_grad()
        def step_part(self, part: Part) -> None:
            """Step what has a gradient of a part that is held; `step` afterwards counts it."""
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
            """Take over a state as it is: nothing is cast, and weights may be elsewhere until their turn."""
            for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
                group.update({name: value for name, value in saved.items() if name != "params"})
                for parameter, index in zip(group["params"], saved["params"], strict=True):
                    held = state["state"].get(index, {})
                    self.state[parameter] = {name: _own(name, value, self.home) for name, value in held.items()}

    OneByOne.__name__, OneByOne.__qualname__ = base.__name__, base.__qualname__
    return OneByOne


def _own(name: str, value: Any, home: torch.device | None) -> Any:
    """A copy, on its device but for torch's count of steps, which is a number in CPU RAM."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if name == "step" or home is None else value.to(home, copy=True)
