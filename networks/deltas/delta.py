"""The interface of all kinds of weight changes, independent of their storage in files."""

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor

from networks.deltas.branch import Branch


class Delta(Protocol):
    """The change of one matrix (out, in), or of a convolution's weight (out, in, k, k), as stored in a file.

    Changes of one weight add up.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the changed weight: (out, in), or (out, in, k, k) for a convolution."""
        ...

    def add_to(self, total: Tensor, multiplier: float) -> None:
        """Add multiplier * the change to `total`, of this shape, float32 on any device, in place."""
        ...

    @classmethod
    def branch(cls, changes: Sequence[tuple[Self, float]]) -> Branch:
        """Return float32 copies of these changes of one matrix, each with its multiplier, as one branch.

        A kind without a combined form returns one branch per change, joined by `networks.deltas.branch.chained`.
        """
        ...
