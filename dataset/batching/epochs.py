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
    """Batches of `Pick`s from a `CachedDataset`, each from one bucket: the batch sampler of a DataLoader.

    Samples, captions and batch order depend only on (seed, epoch): not on the number of processes or workers, nor on a
    global generator. Process `rank` of `num_ranks` takes every num_ranks-th batch; if they do not divide evenly, the
    first batches of the epoch are repeated so that every process has the same number.

    An epoch has as many samples as the datasets, each once, unless datasets set a `weight`: then each bucket gets its
    share of that number, at least one, and each epoch continues through it where the previous one stopped. The last
    batch of a bucket may be smaller; `drop_last` drops it.
    """

    def __init__(self, dataset: CachedDataset, *, seed: int, rank: int = 0, num_ranks: int = 1) -> None:
        assert 0 <= rank < num_ranks
        self._dataset, self._seed, self._rank, self._num_ranks = dataset, seed, rank, num_ranks
        self._epoch, self._skip = 0, 0
        self._sizes = epoch_sizes(dataset)
        if not len(self):
            raise InputError("drop_last leaves no batches: every bucket has fewer samples than its batch_size")

    def set_epoch(self, epoch: int, *, skip: int = 0) -> None:
        """Select the epoch that the next iteration yields, without the first `skip` batches of this process."""
        self._epoch, self._skip = epoch, skip

    def __len__(self) -> int:
        """Return the number of batches per process in an epoch."""
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
    """Return the number of samples of each bucket in an epoch; all of them without `weight`. The sum is always
    `num_items`."""
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
    """Return the number of batches that `num_samples` samples of one bucket make."""
    return num_samples // config.batch_size if config.drop_last else math.ceil(num_samples / config.batch_size)
