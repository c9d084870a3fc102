"""Which of a run's saved files are averaged, and in which order, according to their names and metadata."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from networks.expert import KEY as EXPERT_KEY
from networks.moments import BEST, EMA, MOMENT, is_saved_as
from networks.settings import AverageSettings
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.storage import Header, read_header

log = get_logger(__name__)

SUFFIX = ".safetensors"
# Suffixes after the epoch or step; the first kind that is present is averaged: a file with -best is a copy of one
# of the others, one with -ema is already an average.
KINDS = ("", EMA, BEST, BEST + EMA)
_NAME = re.compile(rf"(?P<base>.+?)(?P<moment>{MOMENT})?(?P<kind>{'|'.join(KINDS[::-1])})")


@dataclass(frozen=True)
class Saved:
    """A saved file and its header."""

    path: Path
    header: Header

    @cached_property
    def parts(self) -> tuple[str, str, str]:
        """The parts of its name: run (including the expert, if there are two), epoch or step, and kind."""
        stem, run = self.path.stem, self.header.metadata.get("ss_output_name")
        if run is not None and stem.startswith(run):
            # The run's own name may look like an epoch, a step or a kind.
            match = _NAME.fullmatch("_" + stem.removeprefix(run))
            if match:
                return run + match["base"][1:], match["moment"] or "", match["kind"]
        match = _NAME.fullmatch(stem)
        assert match is not None
        return match["base"], match["moment"] or "", match["kind"]

    @property
    def step(self) -> int | None:
        """The step after which it was saved, if its metadata has it."""
        said = self.header.metadata.get("ss_steps", "")
        return int(said) if said.isdecimal() else None

    @property
    def session(self) -> str | None:
        """The id of its run, if its metadata has it."""
        return self.header.metadata.get("ss_session_id")


def files_to_average(settings: AverageSettings) -> list[Saved]:
    """Return the files to average, in order. Raises InputError if fewer than two remain, or they belong to different
    experts."""
    given = [Saved(Path(path), read_header(path)) for path in dict.fromkeys(settings.path)]
    kept = _of_one_kind(given)
    if not settings.no_sort:
        kept = _in_order([*kept, *_final(kept, Path(settings.output_file))])
    if len(kept) < 2:
        raise InputError(f"{kept[0].path} is the only file left to average: give two or more")
    experts = {saved.header.metadata.get(EXPERT_KEY): saved.path for saved in kept}
    if len(experts) > 1:
        raise InputError(
            f"{' and '.join(map(str, experts.values()))} are from different experts: average each expert separately"
        )
    sessions = {saved.session: saved.path for saved in kept}
    if len(sessions) > 1:
        log.warning(
            "these files may be from different runs, their ss_session_id differs: %s", _listed(sessions.values())
        )
    return kept


def _of_one_kind(given: Sequence[Saved]) -> list[Saved]:
    kind = min((saved.parts[2] for saved in given), key=KINDS.index)
    others = [saved.path for saved in given if saved.parts[2] != kind]
    if others:
        log.warning("ignoring files of a different kind (-best or -ema): %s", _listed(others))
    return [saved for saved in given if saved.parts[2] == kind]


def _final(kept: Sequence[Saved], output: Path) -> list[Saved]:
    """Return the file saved at the end of the run, which patterns like NAME-*.safetensors miss, if all files that the
    run saved before it are averaged."""
    first, names = kept[0], {saved.path.name for saved in kept}
    base, _, kind = first.parts
    folder, path = first.path.parent, first.path.with_name(base + kind + SUFFIX)
    alike = all((s.path.parent, s.parts[0], s.session) == (folder, base, first.session) for s in kept)
    if not alike or first.session is None or path.name in names or not path.is_file() or _is_same(path, output):
        return []
    saved = (Saved(each, read_header(each)) for each in folder.iterdir() if is_saved_as(each.name, base, kind + SUFFIX))
    of_run = {each.path.name: each for each in saved if each.session == first.session}
    if path.name not in of_run or of_run.keys() - names != {path.name}:
        return []
    log.info("%s is averaged too: it is the final file of the same run", path)
    return [of_run[path.name]]


def _is_same(path: Path, other: Path) -> bool:
    return other.exists() and path.samefile(other)


def _in_order(files: Sequence[Saved]) -> list[Saved]:
    """Return the files sorted by step, without duplicates; by modification time if a file has no step."""
    silent = [saved.path for saved in files if saved.step is None]
    if silent:
        log.warning(
            "sorting by modification time, because these files have no step in their metadata: %s", _listed(silent)
        )
        return sorted(files, key=lambda saved: saved.path.stat().st_mtime_ns)
    kept: dict[tuple[str | None, int | None], Saved] = {}
    for saved in sorted(files, key=lambda saved: saved.step or 0):
        there = kept.setdefault((saved.session, saved.step), saved)
        if there is not saved:
            log.warning("ignoring %s: it has the same step as %s", saved.path, there.path)
    return list(kept.values())


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))
