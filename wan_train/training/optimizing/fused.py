"""The optimizer's step inside of the backward pass: each part of the model is stepped as soon as its gradients are
there, and these are given up, so that those of one part are alive at a time.

A weight may change then, since its gradient is complete once every use of it has been passed. With several processes
the gradients of a part are averaged before its step; nothing else exchanges them.
"""

import math
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from wan_train.training.optimizing.one_by_one import Part

Reduce = Callable[[Tensor], Tensor]


class FusedBackward:
    """Steps of one-by-one `optimizer`s in parts, during the backward pass, clipped to `limit` by the norm of each.

    A part whose gradient is NaN or Inf is left out, and told of by the norm that `finish` returns. It steps for as long
    as something holds it: the weights do not.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parts: Iterable[Part], *, limit: float, reduce: Reduce | None = None
    ) -> None:
        self._optimizer, self._limit, self._reduce = optimizer, limit, reduce
        self._parts = list(parts)
        self._missing = [len(part.parameters) for part in self._parts]
        self._norms: list[float] = []
        for number, part in enumerate(self._parts):
            for parameter in part.parameters:
                parameter.register_post_accumulate_grad_hook(_calling(weakref.WeakMethod(self._arrived), number))

    def finish(self) -> float:
        """Step what waits for gradients that did not come; the norm of all gradients of this pass, before clipping."""
        for number, part in enumerate(self._parts):
            if self._missing[number] != len(part.parameters):
                self._take(number)
        norm = math.hypot(*self._norms)
        self._norms = []
        return norm

    def _arrived(self, number: int) -> None:
        self._missing[number] -= 1
        if self._missing[number] == 0:
            self._take(number)

    def _take(self, number: int) -> None:
        part = self._parts[number]
        self._missing[number] = len(part.parameters)
        waiting = [parameter for parameter in part.parameters if parameter.grad is not None]
        norm = self._clip(waiting)
        self._norms.append(norm)
        if math.isfinite(norm):
            # As in the backward pass: what is fetched ahead of a streamed block is what that needs next.
            with torch.enable_grad(), part.held():
                self._optimizer.step_part(part)  # type: ignore[attr-defined]
        for parameter in waiting:
            parameter.grad = None

    @torch.no_grad()
    def _clip(self, parameters: list[nn.Parameter]) -> float:
        if self._reduce is not None:
            for parameter in parameters:
                parameter.grad = self._reduce(parameter.grad)  # type: ignore[arg-type]
        return float(nn.utils.clip_grad_norm_(parameters, self._limit))


def _calling(arrived: "weakref.WeakMethod[Callable[[int], None]]", number: int) -> Callable[[Tensor], None]:
    """A hook of a parameter of this part. It must not hold what holds the parameter: the collector does not see that
    cycle, since autograd's own graph is part of it, and the weights would outlive their run."""

    def hook(_: Tensor) -> None:
        if (method := arrived()) is not None:
            method(number)

    return hook
