"""Noise levels spread evenly over the samples of an epoch: `--num_timestep_buckets`."""

import hashlib
import random
from collections.abc import Sequence

from dataset.batching.batches import CachedDataset
from dataset.batching.epochs import EpochBatches
from dataset.batching.order import SampleKey

RESOLUTION = 2**32
GOLDEN = round(RESOLUTION * (5**0.5 - 1) / 2)  # multiples of the golden ratio fill the unit interval evenly


def assign(num_samples: int, num_strata: int, *, key: str, epoch: int) -> list[int]:
    """The stratum of each of a number of samples in an epoch (from 0).

    Each stratum is taken as often as any other, or once more where they do not divide. Fewer samples than strata lie
    evenly among these, and over the epochs all get their turn. Which sample gets which stratum depends on `key` and
    the epoch.
    """
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    offset = (start + epoch * GOLDEN) % RESOLUTION
    places = [(slot * RESOLUTION + offset) * num_strata // (num_samples * RESOLUTION) for slot in range(num_samples)]
    random.Random(f"{key} {epoch}").shuffle(places)
    return places


class Strata:
    """Which of `num_strata` equal parts of its distribution the noise level of a sample comes from, in each epoch.

    Even within each dataset of the TOML, over what an epoch really takes of it (`weight` and `drop_last` included). It
    depends on the samples, `seed` and epoch alone: every process, and a run that continues, finds the same.
    """

    def __init__(self, dataset: CachedDataset, num_strata: int, *, seed: int) -> None:
        assert num_strata > 0
        self.num_strata = num_strata
        self._dataset, self._seed = dataset, seed
        self._numbers = {place: bucket.dataset for bucket, places in dataset.buckets.items() for place in places}
        self._batches = EpochBatches(dataset, seed=seed)
        self._epoch: int | None = None
        self._places: dict[SampleKey, int] = {}

    def strata_of(self, keys: Sequence[SampleKey], epoch: int) -> list[int]:
        """The stratum of each sample, from 0; they must be among those that the epoch takes."""
        if epoch != self._epoch:
            self._places, self._epoch = self._assign(epoch), epoch
        return [self._places[key] for key in keys]

    def _assign(self, epoch: int) -> dict[SampleKey, int]:
        self._batches.set_epoch(epoch)
        taken: dict[int, list[SampleKey]] = {}
        for pick in (pick for batch in self._batches for pick in batch):
            taken.setdefault(self._numbers[pick.position], []).append(self._dataset.key_of(pick))
        places: dict[SampleKey, int] = {}
        for number, keys in taken.items():
            keys.sort(key=lambda key: (key.item, key.repeat))
            key = f"{self._seed} {number} strata"
            places |= zip(keys, assign(len(keys), self.num_strata, key=key, epoch=epoch), strict=True)
        return places
