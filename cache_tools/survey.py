"""Survey the cache folders: what exists and what has to be made; report it, and prune on request."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from dataset.caching.manifest import Manifest
from dataset.caching.remains import remove_remains
from dataset.caching.staleness import CacheState, Staleness, list_orphans
from dataset.config import DatasetConfig
from dataset.sources import name_some
from wan_train.distributed.ranks import Place
from wan_train.log import get_logger

logger = get_logger(__name__)

Wanted = TypeVar("Wanted")


@dataclass(frozen=True)
class Survey(Generic[Wanted]):
    """The caches of one kind in a dataset's folder.

    `due` is what this process has to make, in order; `states` are those of its share of the caches; `orphans` are files
    that match nothing planned.
    """

    config: DatasetConfig
    due: tuple[Wanted, ...]
    states: tuple[CacheState, ...]
    orphans: tuple[Path, ...]

    def named(self, *kinds: Staleness) -> list[CacheState]:
        """Return the states of these kinds."""
        return [state for state in self.states if state.kind in kinds]


def survey_caches(
    config: DatasetConfig,
    wanted: Sequence[Wanted],
    look: Callable[[Wanted, Manifest], CacheState],
    *,
    planned: Sequence[Path],
    place: Place,
    is_text: bool = False,
) -> Survey[Wanted]:
    """Look up the caches of this process's share `wanted`; `planned` are the files of all processes.

    The first process reports the orphans.
    """
    with Manifest(config.cache_directory) as manifest:
        states = tuple(look(one, manifest) for one in wanted)
    due = tuple(one for one, state in zip(wanted, states, strict=True) if not state.usable)
    orphans = list_orphans(config.cache_directory, planned, is_text=is_text) if place.rank == 0 else []
    return Survey(config, due, states, tuple(orphans))


def clear_remains(config: DatasetConfig) -> None:
    """Delete unfinished files that killed runs left in a dataset's cache folder."""
    if removed := remove_remains(config.cache_directory):
        logger.info("%s: deleted %d unfinished files of earlier runs", config, len(removed))


def report_findings(survey: Survey[Wanted]) -> None:
    """Log what is stale, truncated, adopted or orphaned."""
    config = survey.config
    if bad := survey.named(Staleness.STALE, Staleness.TRUNCATED):
        logger.info("%s: %d caches will be recreated: %s", config, len(bad), name_some(map(str, bad)))
    if adopted := survey.named(Staleness.FOREIGN):
        some = name_some(state.path.name for state in adopted)
        logger.info("%s: %d caches without a recipe match and are adopted: %s", config, len(adopted), some)
    if survey.orphans:
        some = name_some(path.name for path in survey.orphans)
        logger.info(
            "%s: %d caches match nothing in the dataset (--prune deletes them): %s", config, len(survey.orphans), some
        )


def prune_caches(survey: Survey[Wanted]) -> int:
    """Delete the orphaned and stale caches of a folder; log and count them."""
    bad = [state.path for state in survey.named(Staleness.STALE, Staleness.TRUNCATED)]
    for path in (*survey.orphans, *bad):
        path.unlink(missing_ok=True)
    if survey.orphans:
        some = name_some(path.name for path in survey.orphans)
        logger.info("%s: deleted %d orphaned caches: %s", survey.config, len(survey.orphans), some)
    if bad:
        logger.info("%s: deleted %d stale caches: %s", survey.config, len(bad), name_some(path.name for path in bad))
    return len(survey.orphans) + len(bad)


def count_kinds(surveys: Sequence[Survey[Wanted]]) -> Counter[str]:
    """Return the number of caches in each state, by its name, and of orphans."""
    counts = Counter(state.kind.value for survey in surveys for state in survey.states)
    counts["orphaned"] = sum(len(survey.orphans) for survey in surveys)
    return counts
