"""Which of several processes this one is, as `accelerate launch` and torchrun tell it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True)
class Place:
    """This process among `num_ranks`; `local_rank` counts on its own machine."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0

    def share(self, parts: Sequence[Part]) -> list[Part]:
        """Every `num_ranks`-th part: all processes together have each once, if all are given the same."""
        return list(parts[self.rank :: self.num_ranks])


def find_place() -> Place:
    """This process's place, from the environment; alone where nothing is said."""
    rank, num_ranks, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Place(int(rank or 0), int(num_ranks or 1), int(local or 0))


def first_machine_share(parts: Sequence[Part]) -> list[Part]:
    """Return this process's share of what the processes of the first machine do together; none for other machines.

    For files that the first process is to see: other machines may have a disk of their own.
    """
    place = find_place()
    num_local = min(int(os.environ.get("LOCAL_WORLD_SIZE") or place.num_ranks), place.num_ranks)
    return Place(place.rank, num_local).share(parts) if place.rank < num_local else []
