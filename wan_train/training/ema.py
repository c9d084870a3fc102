"""An exponential moving average of what is trained, on its device or in main memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wan_train.memory.lanes import make_lane


class Ema:
    """Averages of named parameters: average += (1 - decay) * (parameter - average) after each step.

    Early on the decay is lower, (1 + steps) / (10 + steps), so that the start is forgotten (as in TensorFlow's
    ExponentialMovingAverage with num_updates). With `in_main_memory` they are there, whatever the device, and come
    to it one at a time to be moved on.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, *, in_main_memory: bool = False) -> None:
        self._parameters, self._decay, self._steps = dict(parameters), decay, 0
        copied = _to_main_memory if in_main_memory else torch.clone
        self._averages = {name: copied(_float32(parameter.detach())) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, expert: str | None = None) -> None:
        """Take in the parameters after a step, of whichever expert."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for name, parameter in self._parameters.items():
            kept = self._averages[name]
            average = kept.to(parameter.device, non_blocking=True)  # itself, where it is there already
            kept.copy_(average.lerp_(_float32(parameter.detach()), 1 - decay))

    @property
    def averages(self) -> dict[nn.Parameter, Tensor]:
        """The average of each parameter, as fine as it is kept and where it is."""
        return {parameter: self._averages[name] for name, parameter in self._parameters.items()}

    @contextmanager
    def applied(self, forget: Callable[[], None]) -> Iterator[None]:
        """While it lasts the parameters hold their averages, each in its own memory: for the model to compute with.

        What they held is in main memory meanwhile. `forget` is called before each exchange: nothing that streams may be
        on the device then.
        """
        forget()
        kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}
        try:
            self._fill(self._averages)
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


def reading(averages: Mapping[nn.Parameter, Tensor]) -> Callable[[nn.Parameter], Tensor]:
    """What reads a parameter as its average, or as it is where it has none: for files.

    The parameter itself is left alone: one whose `data` was of another dtype or device for a while is lost to those
    who count on its gradients (data-parallel training).
    """
    return lambda parameter: averages[parameter] if parameter in averages else parameter.detach()


def _to_main_memory(tensor: Tensor) -> Tensor:
    """A copy that the tensor's device reads and writes by itself."""
    memory = make_lane(tensor.device).host(tensor.numel() * tensor.element_size())
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _float32(tensor: Tensor) -> Tensor:
    """The average of bfloat16 weights is finer than they are."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
