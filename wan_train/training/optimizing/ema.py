"""An exponential moving average of what is trained, on its device or in CPU RAM."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from wan_train.placement.lanes import Lane
from wan_train.placement.states import HostStates
from wan_train.training.carried import Stateful

_AVERAGE = "average"


class AveragedWeights(Stateful, Protocol):
    """Averages of what is trained: of one model, or of both experts."""

    def update(self, expert: str | None) -> None:
        """Take in the parameters after a step, those of one of two experts."""
        ...

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """The average of each parameter."""
        ...

    def applied(self, forget: Callable[[], None]) -> AbstractContextManager[None]:
        """While it lasts the parameters hold their averages; `forget` is called before each exchange."""
        ...


class Ema:
    """Averages of named parameters: average += (1 - decay) * (parameter - average) after each step.

    Early on the decay is lower, (1 + steps) / (10 + steps), so that the start is forgotten (as in TensorFlow's
    ExponentialMovingAverage with num_updates). With a `lane` they are in CPU RAM, and those of parameters on its
    device come there for their update as an optimizer's states do, see `HostStates`: up to three at a time, and no
    copy is waited for until the averages are read.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, *, lane: Lane | None = None) -> None:
        self._parameters, self._decay, self._steps = dict(parameters), decay, 0
        self._lane, self._host = lane, HostStates(lane) if lane else None
        self._kept: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            self._kept[name] = {_AVERAGE: _float32(parameter.detach()).clone()}
            with self._at_hand(name):
                pass  # on its way to CPU RAM before the next one is made
        self._settle()

    @torch.no_grad()
    def update(self, expert: str | None = None) -> None:
        """Take in the parameters after a step, of whichever expert."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, parameter in self._parameters.items():
            with self._at_hand(name):
                self._kept[name][_AVERAGE].lerp_(_float32(parameter.detach()), 1 - decay)
        if self._host is not None:
            self._host.rest()

    def _at_hand(self, name: str) -> AbstractContextManager[None]:
        """While it lasts the average is where its parameter is; a block that streams has both in CPU RAM."""
        if self._host is None or self._lane is None or self._parameters[name].device.type != self._lane.device.type:
            return nullcontext()
        return self._host.at_hand(name, self._kept[name])

    def _settle(self) -> dict[str, Tensor]:
        """The averages by name, whole: what is on its way to CPU RAM is there."""
        if self._host is not None:
            self._host.settle()
        return {name: kept[_AVERAGE] for name, kept in self._kept.items()}

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """The average of each parameter, as fine as it is kept and where it is."""
        return {self._parameters[name]: average for name, average in self._settle().items()}

    @contextmanager
    def applied(self, forget: Callable[[], None]) -> Iterator[None]:
        """While it lasts the parameters hold their averages, each in its own memory: for the model to compute with.

        What they held is in CPU RAM meanwhile. `forget` is called before each exchange: nothing that streams may be
        on the device then.
        """
        forget()
        kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}
        try:
            self._fill(self._settle())
            yield
        finally:
            forget()
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """What `load_state_dict` takes."""
        return {"steps": self._steps, "averages": self._settle()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Resume from a saved state."""
        steps, averages = state["steps"], state["averages"]
        assert isinstance(steps, int) and isinstance(averages, Mapping)
        self._steps = steps
        for name, average in self._settle().items():
            average.copy_(averages[name])


def reading(averages: Mapping[nn.Parameter, Tensor]) -> Callable[[nn.Parameter], Tensor]:
    """What reads a parameter as its average, or as it is where it has none: for files.

    The parameter itself is left alone: one whose `data` was of another dtype or device for a while is lost to those
    who count on its gradients (data-parallel training).
    """
    return lambda parameter: averages[parameter] if parameter in averages else parameter.detach()


def _float32(tensor: Tensor) -> Tensor:
    """The average of bfloat16 weights is finer than they are."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
