"""The interface of every kind of change of a matrix, whatever a file keeps of it."""

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor

from networks.deltas.branch import Branch


class Delta(Protocol):
    """The change of one matrix (out, in), or of the weight (out, in, k, k) of a convolution, as a file holds it.

    Changes of one weight add up.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the matrix that it changes, (out, in, k, k) of a convolution's weight."""
        ...

    def add_to(self, total: Tensor, multiplier: float) -> None:
        """Add multiplier * the change to `total`, of this shape, float32 on any device, in place."""
        ...

    @classmethod
    def branch(cls, changes: Sequence[tuple[Self, float]]) -> Branch:
        """Return float32 copies of these changes of one matrix, each with its multiplier, as one branch.

        A kind that has no single form for several makes a branch of each: `networks.deltas.branch.chained`.
        """
        ...
