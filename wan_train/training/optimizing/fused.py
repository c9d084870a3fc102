"""Optimizer steps fused into the backward pass: each part of the model is stepped as soon as its gradients are
complete, and these are freed, so that only one part's gradients exist at a time.

This is safe because a weight's gradient is complete only after its last use in the backward pass. With several
processes, the gradients of a part are averaged just before its step, and nowhere else.
"""

import math
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from wan_train.training.optimizing.one_by_one import Part

Reduce = Callable[[Tensor], Tensor]


class FusedBackward:
    """Steps an `optimizer` of `one_by_one` part by part during the backward pass, clipping the gradient of each part to
    the norm `limit`.

    A part whose gradient is NaN or Inf is skipped, which shows in the norm that `finish` returns. The hooks hold only
    weak references, so keep a reference to this object while training.
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
        """Step the parts that got only some of their gradients; return the norm of all gradients of this pass before
        clipping."""
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
            # With gradients enabled, so that streaming prefetches in the order of the backward pass.
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
    """Return a hook for a parameter of this part. It holds a weak reference: the garbage collector cannot see a cycle
    through autograd's graph, and the weights would never be freed."""

    def hook(_: Tensor) -> None:
        if (method := arrived()) is not None:
            method(number)

    return hook
