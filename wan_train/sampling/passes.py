"""The passes of the model that make up a step, as what caches, cuts or shares them out sees them."""

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
    """Which pass of a step it is: the same name at every step, so that states can be kept by it.

    `prompts` are those of its batch, `skips` says that blocks are left out (skip-layer guidance), `window` counts the
    windows of a long video.
    """

    prompts: Prompts
    skips: bool = False
    window: int = 0


@dataclass(frozen=True)
class Pass:
    """One pass: `latents` (B, C, F, H, W), `timestep` (B,) or (B, F), further arguments of `Dit.forward`, and the
    index of its step among all of the request, from 0."""

    name: PassName
    step: int
    latents: Tensor
    timestep: Tensor
    inputs: Mapping[str, Any]


Run = Callable[[Pass], Tensor]
Wrap = Callable[[Run], Run]


class Sharing(Protocol):
    """How several processes make one video together."""

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """While this is entered, let the model share the work of each pass out."""
        ...

    def together(self, passes: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Return the velocities of a step's passes, in their order, on every process."""
        ...


class Alone:
    """One process: one pass after the other."""

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Leave the model as it is."""
        return nullcontext()

    def together(self, passes: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Return the velocities of the passes, in their order."""
        return [run() for run in passes]


ALONE = Alone()


def run_model(model: nn.Module) -> Run:
    """Return the plain pass of a model: velocity (B, C, F, H, W) float32."""
    return lambda one: model(one.latents, one.timestep, **one.inputs)
