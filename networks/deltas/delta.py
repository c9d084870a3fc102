"""What every kind of change of a matrix answers to, whatever a file keeps of it."""

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor

from networks.deltas.branch import Branch


class Delta(Protocol):
    """The change of one matrix (out, in), as a file holds it. Changes of one matrix add up."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that it changes."""
        ...

    def add_to(self, total: Tensor, multiplier: float) -> None:
        """Add multiplier * the change to `total` (out, in), float32 on any device, in place."""
        ...

    @classmethod
    def branch(cls, changes: Sequence[tuple[Self, float]]) -> Branch:
        """Return float32 copies of these changes of one matrix, each with its multiplier, as one branch.

        A kind that has no single form for several makes a branch of each: `networks.deltas.branch.chained`.
        """
        ...
