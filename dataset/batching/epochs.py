"""The batches of an epoch: which samples of each bucket, in which order, for which process."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator

from dataset.batching.batches import Bucket, CachedDataset
from dataset.batching.order import Pick, share_out, take_share
from dataset.config import DatasetConfig
from wan_train.errors import InputError


class EpochBatches:
    """Batches of `Pick`s from a `CachedDataset`, each of one bucket: the batch sampler of a DataLoader.

    Samples, captions and the order of batches depend on (seed, epoch) alone: not on the number of processes or workers,
    not on a global generator. Process `rank` of `num_ranks` takes every num_ranks-th batch; where they do not divide,
    the first batches of the epoch are given out again, so that every process has as many.

    An epoch takes as many samples as there are, each once, unless datasets have a `weight`: then each bucket takes its
    share of that number, at least one, and an epoch continues in it where the one before stopped. The last batch of a
    bucket may be smaller; `drop_last` leaves it out.
    """

    def __init__(self, dataset: CachedDataset, *, seed: int, rank: int = 0, num_ranks: int = 1) -> None:
        assert 0 <= rank < num_ranks
        self._dataset, self._seed, self._rank, self._num_ranks = dataset, seed, rank, num_ranks
        self._epoch, self._skip = 0, 0
        self._sizes = epoch_sizes(dataset)
        if not len(self):
            raise InputError("drop_last leaves no batch at all: every bucket holds less than its batch_size")

    def set_epoch(self, epoch: int, *, skip: int = 0) -> None:
        """Choose the order that the next iteration takes, without its first `skip` batches of this process."""
        self._epoch, self._skip = epoch, skip

    def __len__(self) -> int:
        """Batches of one process in an epoch."""
        total = sum(count_batches(size, self._config(bucket)) for bucket, size in self._sizes.items())
        return math.ceil(total / self._num_ranks)

    def __iter__(self) -> Iterator[list[Pick]]:
        batches: list[list[Pick]] = []
        for bucket, size in self._sizes.items():
            key = " ".join(map(str, (self._seed, *bucket[:3], *bucket.conditions)))
            share = take_share(self._dataset.buckets[bucket], key, epoch=self._epoch, size=size)
            picks = [self._dataset.pick(*taken, seed=self._seed, epoch=self._epoch) for taken in share]
            step = self._config(bucket).batch_size
            batches += [picks[step * n : step * (n + 1)] for n in range(count_batches(size, self._config(bucket)))]
        random.Random(f"{self._seed} {self._epoch}").shuffle(batches)
        padded = itertools.islice(itertools.cycle(batches), len(self) * self._num_ranks)
        return itertools.islice(padded, self._rank + self._skip * self._num_ranks, None, self._num_ranks)

    def _config(self, bucket: Bucket) -> DatasetConfig:
        return self._dataset.configs[bucket.dataset]


def epoch_sizes(dataset: CachedDataset) -> dict[Bucket, int]:
    """How many samples of each bucket an epoch takes; without `weight` all of them. The sum is `num_items` always."""
    buckets = sorted(dataset.buckets)
    present = {bucket: len(dataset.buckets[bucket]) for bucket in buckets}
    weights = {number: config.weight for number, config in dataset.configs.items()}
    if all(weight is None for weight in weights.values()):
        return present
    totals = Counter[int]()
    for bucket, size in present.items():
        totals[bucket.dataset] += size
    shares = [(weights[b.dataset] or 1.0) * present[b] / totals[b.dataset] for b in buckets]
    return dict(zip(buckets, share_out(dataset.num_items, shares), strict=True))


def count_batches(num_samples: int, config: DatasetConfig) -> int:
    """Number of batches that samples of one bucket make."""
    return num_samples // config.batch_size if config.drop_last else math.ceil(num_samples / config.batch_size)
