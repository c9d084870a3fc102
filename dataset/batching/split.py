"""Hold files out of training, chosen by name, so that all clips and repeats of a file are on the same side."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dataset.batching.batches import CachedDataset
from dataset.sources import ClipPlan
from wan_train.errors import InputError


@dataclass(frozen=True)
class Split:
    """Two datasets without common files, with the sample keys and dataset numbers of the whole one."""

    training: CachedDataset
    held_out: CachedDataset


def split_off(dataset: CachedDataset, share: float, *, seed: int) -> Split:
    """Hold out about `share` of the files of each dataset, at least one in total.

    The choice depends only on `seed` and on the file names without folder and suffix: not on their order, nor on other
    settings of the run. A name that occurs in several datasets (one video cut in two ways) is held out of all of them.
    Datasets with `is_reg` do not measure what is learnt, so none of their clips are evaluated. Raises InputError if no
    other dataset has two files.
    """
    chosen = choose_names([_names(plan) for plan in dataset.plans if not plan.config.is_reg], share, seed=seed)
    if not chosen:
        raise InputError(
            f"--validation_split {share:g} needs a dataset with at least two files (not is_reg): use"
            " --validation_config"
        )
    return Split(
        CachedDataset([_keep(plan, _names(plan) - chosen) for plan in dataset.plans]),
        CachedDataset([_keep(plan, () if plan.config.is_reg else chosen) for plan in dataset.plans]),
    )


def choose_names(datasets: Sequence[Collection[str]], share: float, *, seed: int) -> set[str]:
    """Return the names with the lowest keyed hashes in each dataset; the highest one overall is never chosen, so that
    some remain."""

    def place(name: str) -> bytes:
        return hashlib.blake2b(f"held out/{seed}/{name}".encode(), digest_size=16).digest()

    chosen: set[str] = set()
    for names in datasets:
        count = min(int(share * len(names) + 0.5), len(names) - 1)
        chosen |= set(sorted(names, key=place)[: max(count, 0)])
    large = [name for names in datasets if len(names) > 1 for name in names]
    return chosen or set(sorted(large, key=place)[:1])


def find_shared(training: CachedDataset, held_out: CachedDataset) -> list[str]:
    """Return the paths of the files that are in both datasets."""
    one, other = ({clip.item.path.resolve() for plan in d.plans for clip in plan.clips} for d in (training, held_out))
    return sorted(map(str, one & other))


def name_files(dataset: CachedDataset) -> list[str]:
    """Return the name, without folder and suffix, of each position's source file."""
    names = [
        clip.item.path.stem for plan in dataset.plans for clip in plan.clips for _ in range(plan.config.num_repeats)
    ]
    assert len(names) == len(dataset)
    return names


def _names(plan: ClipPlan) -> set[str]:
    return {clip.item.path.stem for clip in plan.clips}


def _keep(plan: ClipPlan, names: Collection[str]) -> ClipPlan:
    """Return the plan with only the clips of these names; a plan without clips is kept, so that sample keys do not
    change."""
    return replace(
        plan,
        items=tuple(item for item in plan.items if item.path.stem in names),
        clips=tuple(clip for clip in plan.clips if clip.item.path.stem in names),
    )
