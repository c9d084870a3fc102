"""The rank of this process, as set by `accelerate launch` and torchrun."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True)
class Place:
    """The rank of this process among `num_ranks`; `local_rank` is the rank on its machine."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0

    def share(self, parts: Sequence[Part]) -> list[Part]:
        """Return every `num_ranks`-th part; the shares of all ranks are disjoint and complete if all get the same
        parts."""
        return list(parts[self.rank :: self.num_ranks])


def find_place() -> Place:
    """Return this process's rank from the environment; rank 0 of 1 by default."""
    rank, num_ranks, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Place(int(rank or 0), int(num_ranks or 1), int(local or 0))


def first_machine_share(parts: Sequence[Part]) -> list[Part]:
    """Return this process's share of the work of the first machine's processes; empty on other machines.

    Use it for files that the first process must see: other machines may not share its disk.
    """
    place = find_place()
    num_local = min(int(os.environ.get("LOCAL_WORLD_SIZE") or place.num_ranks), place.num_ranks)
    return Place(place.rank, num_local).share(parts) if place.rank < num_local else []
