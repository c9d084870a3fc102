"""Files held out of training: chosen by name, so that all clips and repeats of one are on the same side."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dataset.batching.batches import CachedDataset
from dataset.sources import ClipPlan
from wan_train.errors import InputError


@dataclass(frozen=True)
class Split:
    """Two datasets without a common file, with the keys of the whole one and its datasets' numbers."""

    training: CachedDataset
    held_out: CachedDataset


def split_off(dataset: CachedDataset, share: float, *, seed: int) -> Split:
    """Hold out about `share` of the files of each dataset, at least one in all.

    Which ones depends on `seed` and on the files' names without folder and suffix: not on their order, nor on what
    else a run does. A name that is in several datasets (one video cut in two ways) is held out of all. Datasets with
    `is_reg` do not measure what is learnt, so none of their clips are measured. Raises InputError where no other
    dataset has two files.
    """
    chosen = choose_names([_names(plan) for plan in dataset.plans if not plan.config.is_reg], share, seed=seed)
    if not chosen:
        raise InputError(
            f"--validation_split {share:g} needs a dataset of two files (is_reg aside): give --validation_config"
        )
    return Split(
        CachedDataset([_keep(plan, _names(plan) - chosen) for plan in dataset.plans]),
        CachedDataset([_keep(plan, () if plan.config.is_reg else chosen) for plan in dataset.plans]),
    )


def choose_names(datasets: Sequence[Collection[str]], share: float, *, seed: int) -> set[str]:
    """The names whose keyed hash is lowest in each dataset; the highest of all is in none, so that some remain."""

    def place(name: str) -> bytes:
        return hashlib.blake2b(f"held out/{seed}/{name}".encode(), digest_size=16).digest()

    chosen: set[str] = set()
    for names in datasets:
        count = min(int(share * len(names) + 0.5), len(names) - 1)
        chosen |= set(sorted(names, key=place)[: max(count, 0)])
    large = [name for names in datasets if len(names) > 1 for name in names]
    return chosen or set(sorted(large, key=place)[:1])


def find_shared(training: CachedDataset, held_out: CachedDataset) -> list[str]:
    """The files, by path, that are in both."""
    one, other = ({clip.item.path.resolve() for plan in d.plans for clip in plan.clips} for d in (training, held_out))
    return sorted(map(str, one & other))


def name_files(dataset: CachedDataset) -> list[str]:
    """The name, without folder and suffix, of the file that each position's clip is cut from."""
    names = [
        clip.item.path.stem for plan in dataset.plans for clip in plan.clips for _ in range(plan.config.num_repeats)
    ]
    assert len(names) == len(dataset)
    return names


def _names(plan: ClipPlan) -> set[str]:
    return {clip.item.path.stem for clip in plan.clips}


def _keep(plan: ClipPlan, names: Collection[str]) -> ClipPlan:
    """The plan with the clips of these names alone; a plan without clips stays, so that keys are as they were."""
    return replace(
        plan,
        items=tuple(item for item in plan.items if item.path.stem in names),
        clips=tuple(clip for clip in plan.clips if clip.item.path.stem in names),
    )
