"""Spread noise levels evenly over the samples of an epoch: `--num_timestep_buckets`."""

import hashlib
import random
from collections.abc import Sequence

from dataset.batching.batches import CachedDataset
from dataset.batching.epochs import EpochBatches
from dataset.batching.order import SampleKey

RESOLUTION = 2**32
GOLDEN = round(RESOLUTION * (5**0.5 - 1) / 2)  # multiples of the golden ratio are evenly spread over the unit interval


def assign(num_samples: int, num_strata: int, *, key: str, epoch: int) -> list[int]:
    """Assign a stratum to each of a number of samples in an epoch (from 0).

    All strata get the same number of samples, up to one. If there are fewer samples than strata, they are spread evenly
    over the strata, and all strata are covered over the epochs. The assignment depends on `key` and the epoch.
    """
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    offset = (start + epoch * GOLDEN) % RESOLUTION
    places = [(slot * RESOLUTION + offset) * num_strata // (num_samples * RESOLUTION) for slot in range(num_samples)]
    random.Random(f"{key} {epoch}").shuffle(places)
    return places


class Strata:
    """Assigns each sample, in each epoch, one of `num_strata` equally likely parts of the distribution of noise levels.

    Strata are even within each dataset of the TOML, over the samples that an epoch really uses (`weight` and
    `drop_last` included). They depend only on the samples, `seed` and epoch, so all processes and resumed runs agree.
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
        """Return the stratum of each sample, from 0; all must be among the samples that the epoch uses."""
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
