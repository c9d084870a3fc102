"""What an epoch takes and in which order: everything is drawn by key, nothing by a generator that others draw from.

Text as a seed is hashed whole, so that neighbouring seeds and epochs have nothing in common.
"""

import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SampleKey:
    """What a sample is called on every machine: folder and name of its cache file, and which of its repeats it is."""

    item: str
    repeat: int


@dataclass(frozen=True)
class Pick:
    """A sample as an epoch takes it: its position, which of its captions (None: empty text), for which time, and
    whether mirrored."""

    position: int
    variant: int | None = 0
    turn: int = 0
    flipped: bool = False


def take_share(positions: Sequence[int], key: str, *, epoch: int, size: int) -> list[tuple[int, int]]:
    """The `size` (position, turn) of an epoch (from 0), out of an endless row of which each takes the next.

    Nothing comes again before everything has come; `turn` counts, from 0, how often a position came in this epoch.
    """
    first = epoch * size
    # Whole rounds before this epoch need not be drawn.
    row = itertools.chain.from_iterable(
        random.Random(f"{key} {number}").sample(positions, len(positions))
        for number in itertools.count(first // len(positions))
    )
    turns = dict.fromkeys(positions, 0)
    taken = []
    for position in itertools.islice(row, first % len(positions), first % len(positions) + size):
        taken.append((position, turns[position]))
        turns[position] += 1
    return taken


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts of 1 or more about as `weights` (> 0) stand to each other.

    Every part begins with 1 and the rest goes one by one to the part that is most behind: Webster's rule of seats in a
    parliament. There are no more parts than `total`.
    """
    assert len(weights) <= total
    parts = [1] * len(weights)
    behind = [(-weight / 3, index) for index, weight in enumerate(weights)]
    heapq.heapify(behind)
    for _ in range(total - len(weights)):
        _, index = behind[0]
        parts[index] += 1
        heapq.heapreplace(behind, (-weights[index] / (2 * parts[index] + 1), index))
    return parts


def chance_of(key: SampleKey, decision: str, *, seed: int, epoch: int) -> random.Random:
    """The generator of one decision about a sample in an epoch (from 0)."""
    return random.Random(f"{seed} {epoch} {key.repeat} {key.item} {decision}")


def draw_variant(key: SampleKey, *, seed: int, epoch: int, num_captions: int, dropout_rate: float) -> int | None:
    """Which of a sample's captions an epoch takes, all alike, or None for empty text, with `dropout_rate`."""
    if num_captions == 1 and not dropout_rate:
        return 0
    chance = chance_of(key, "caption", seed=seed, epoch=epoch)
    return None if chance.random() < dropout_rate else chance.randrange(num_captions)


def draw_flip(key: SampleKey, *, seed: int, epoch: int) -> bool:
    """Whether an epoch takes a sample mirrored: every other time."""
    return chance_of(key, "flip", seed=seed, epoch=epoch).random() < 0.5
