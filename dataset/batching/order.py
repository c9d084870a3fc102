"""Which samples an epoch uses, and in which order. Every draw is keyed; no shared generator is used.

Text seeds are hashed whole, so that neighbouring seeds and epochs are unrelated.
"""

import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SampleKey:
    """The machine-independent name of a sample: folder and name of its cache file, and its repeat number."""

    item: str
    repeat: int


@dataclass(frozen=True)
class Pick:
    """A sample as used in an epoch: its position, the index of its caption (None: empty text), how often it has already
    occurred in the epoch, and whether it is mirrored."""

    position: int
    variant: int | None = 0
    turn: int = 0
    flipped: bool = False


def take_share(positions: Sequence[int], key: str, *, epoch: int, size: int) -> list[tuple[int, int]]:
    """Return the `size` (position, turn) pairs of an epoch (from 0), taken from an endless shuffled sequence in which
    each epoch continues where the previous one stopped.

    No position repeats before all have occurred; `turn` counts, from 0, the occurrences of a position in this epoch.
    """
    first = epoch * size
    # Complete rounds before this epoch need not be drawn.
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
    """Divide `total` into integer parts of 1 or more, approximately proportional to `weights` (> 0).

    Every part starts at 1 and the rest is allocated one by one to the most under-represented part (Webster's method of
    apportionment). There are at most `total` parts.
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
    """Return the generator for one decision about a sample in an epoch (from 0)."""
    return random.Random(f"{seed} {epoch} {key.repeat} {key.item} {decision}")


def draw_variant(key: SampleKey, *, seed: int, epoch: int, num_captions: int, dropout_rate: float) -> int | None:
    """Return the index of the caption to use in an epoch, uniformly drawn, or None (empty text) with probability
    `dropout_rate`."""
    if num_captions == 1 and not dropout_rate:
        return 0
    chance = chance_of(key, "caption", seed=seed, epoch=epoch)
    return None if chance.random() < dropout_rate else chance.randrange(num_captions)


def draw_flip(key: SampleKey, *, seed: int, epoch: int) -> bool:
    """Return whether a sample is mirrored in an epoch, with probability 0.5."""
    return chance_of(key, "flip", seed=seed, epoch=epoch).random() < 0.5
