"""Exponential moving average (EMA) of the trained parameters, on their device or in CPU RAM."""

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
    """EMA of the trained parameters of one model or of both experts."""

    def update(self, expert: str | None) -> None:
        """Update the EMA after a step, of one of two experts."""
        ...

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """EMA of each parameter."""
        ...

    def applied(self, forget: Callable[[], None]) -> AbstractContextManager[None]:
        """Replace the parameters with their EMA inside. `forget` is called before each swap."""
        ...


class Ema:
    """EMA of named parameters: average += (1 - decay) * (parameter - average) after each step.

    The decay is lower at first, (1 + steps) / (10 + steps), so that the initial values are forgotten (as in
    TensorFlow's ExponentialMovingAverage with num_updates). With a `lane` the EMA is in CPU RAM. Where the parameter is
    on the lane's device, its EMA is copied there for the update, like optimizer states, see `HostStates`: at most three
    at a time, and without waiting for copies until the EMA is read.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, *, lane: Lane | None = None) -> None:
        self._parameters, self._decay, self._steps = dict(parameters), decay, 0
        self._lane, self._host = lane, HostStates(lane) if lane else None
        self._kept: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            self._kept[name] = {_AVERAGE: _float32(parameter.detach()).clone()}
            with self._at_hand(name):
                pass  # starts the copy to CPU RAM before the next one is created
        self._settle()

    @torch.no_grad()
    def update(self, expert: str | None = None) -> None:
        """Update the EMA after a step; the expert is ignored."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, parameter in self._parameters.items():
            with self._at_hand(name):
                self._kept[name][_AVERAGE].lerp_(_float32(parameter.detach()), 1 - decay)
        if self._host is not None:
            self._host.rest()

    def _at_hand(self, name: str) -> AbstractContextManager[None]:
        """Have the EMA on its parameter's device inside; for a streamed block both are in CPU RAM."""
        if self._host is None or self._lane is None or self._parameters[name].device.type != self._lane.device.type:
            return nullcontext()
        return self._host.at_hand(name, self._kept[name])

    def _settle(self) -> dict[str, Tensor]:
        """Wait for copies to CPU RAM, and return the EMA by name."""
        if self._host is not None:
            self._host.settle()
        return {name: kept[_AVERAGE] for name, kept in self._kept.items()}

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """EMA of each parameter, in the data type and on the device where it is kept."""
        return {self._parameters[name]: average for name, average in self._settle().items()}

    @contextmanager
    def applied(self, forget: Callable[[], None]) -> Iterator[None]:
        """Replace the parameters' values with their EMA inside, for computing with the model.

        The values are kept in CPU RAM meanwhile. `forget` is called before each swap, and must drop streamed weights
        from the device.
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
        """Return the number of steps and the EMA."""
        return {"steps": self._steps, "averages": self._settle()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore a saved state."""
        steps, averages = state["steps"], state["averages"]
        assert isinstance(steps, int) and isinstance(averages, Mapping)
        self._steps = steps
        for name, average in self._settle().items():
            average.copy_(averages[name])


def reading(averages: Mapping[nn.Parameter, Tensor]) -> Callable[[nn.Parameter], Tensor]:
    """Return a function that reads a parameter's EMA, or the parameter itself if it has none, for saving.

    The parameter is not modified: temporarily assigning `data` of another data type or device would break gradient
    synchronisation in data-parallel training.
    """
    return lambda parameter: averages[parameter] if parameter in averages else parameter.detach()


def _float32(tensor: Tensor) -> Tensor:
    """Widen bfloat16, in which small updates of the EMA would be lost."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
