"""The model passes of a step, and the wraps that cache them, cut them into windows or divide them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

Prompts = tuple[str, ...]
POSITIVE: Prompts = ("positive",)
NEGATIVE: Prompts = ("negative",)
BOTH = POSITIVE + NEGATIVE


@dataclass(frozen=True)
class PassName:
    """The identity of a pass within its step; it is the same at every step, so it can be a key for state.

    `prompts` are those of its batch, `skips` is true if blocks are skipped (skip-layer guidance), `window` is the index
    of the sliding window.
    """

    prompts: Prompts
    skips: bool = False
    window: int = 0


@dataclass(frozen=True)
class Pass:
    """One pass: `latents` (B, C, F, H, W), `timestep` (B,) or (B, F), the other arguments of `Dit.forward`, and the
    index of its step in the request, from 0."""

    name: PassName
    step: int
    latents: Tensor
    timestep: Tensor
    inputs: Mapping[str, Any]


Run = Callable[[Pass], Tensor]
Wrap = Callable[[Run], Run]


class Sharing(Protocol):
    """How several processes generate one video together."""

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Divide the work of each pass among the processes inside the context."""
        ...

    def together(self, passes: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Return the velocities of a step's passes, in order, on every process."""
        ...


class Alone:
    """A single process, which runs the passes one after the other."""

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def together(self, passes: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Return the velocities of the passes, in order."""
        return [run() for run in passes]


ALONE = Alone()


def run_model(model: nn.Module) -> Run:
    """Return the function that runs a pass of the model: velocity (B, C, F, H, W) float32."""
    return lambda one: model(one.latents, one.timestep, **one.inputs)
