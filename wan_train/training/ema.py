"""An exponential moving average of what is trained, on its device or in main memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of named parameters: average += (1 - decay) * (parameter - average) after each step.

    Early on the decay is lower, (1 + steps) / (10 + steps), so that the start is forgotten (as in TensorFlow's
    ExponentialMovingAverage with num_updates). With `in_main_memory` they are there, whatever the device, and a
    parameter at a time comes to them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, *, in_main_memory: bool = False) -> None:
        self._parameters, self._decay, self._steps = dict(parameters), decay, 0
        self._averages = {
            name: _float32(parameter.detach().to("cpu" if in_main_memory else parameter.device, copy=True))
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, expert: str | None = None) -> None:
        """Take in the parameters after a step, of whichever expert."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, parameter in self._parameters.items():
            average = self._averages[name]
            average.lerp_(_float32(parameter.detach().to(average.device)), 1 - decay)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """While it lasts the parameters are their averages, as fine as they are kept and where they are: for files."""
        kept = {name: parameter.data for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self._averages[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]

    @contextmanager
    def applied(self, forget: Callable[[], None]) -> Iterator[None]:
        """While it lasts the parameters hold their averages, each in its own memory: for the model to compute with.

        What they held is in main memory meanwhile. `forget` is called before each exchange: nothing that streams may be
        on the device then.
        """
        forget()
        kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}
        self._fill(self._averages)
        try:
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
        return {"steps": self._steps, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state."""
        steps, averages = state["steps"], state["averages"]
        assert isinstance(steps, int) and isinstance(averages, Mapping)
        self._steps = steps
        for name, average in self._averages.items():
            average.copy_(averages[name])


def _float32(tensor: Tensor) -> Tensor:
    """The average of bfloat16 weights is finer than they are."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
