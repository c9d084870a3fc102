"""Handle files that already exist under the names a run will save: those of other runs, and its own earlier final
files."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dataset.sources import name_some
from networks.moments import BEST, EMA, MOMENT, is_saved_as, of_epoch, of_step
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.models.dit.experts import ORDER
from wan_train.shards import INDEX, expand, files_of, names_of
from wan_train.storage import replacing, replacing_folder
from wan_train.training.saving.checkpoints import EMA_FILE, FILE, STATE, path_of
from wan_train.training.saving.choosing import farthest, whole_states
from wan_train.training.saving.identity import Identity
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.saving.state import Position, State, open_state

log = get_logger(__name__)


def warn_of_others(save: SaveSettings, identity: Identity, state: State | None) -> None:
    """Warn about files of other runs that this run will replace; no warning for a run that is resumed as itself."""
    if state is not None and state.session in (None, identity.session):
        return
    found = sorted(_of_name(save))
    if not found:
        return
    last = farthest(whole_states(save))
    way = f"; to resume an earlier run, stop this one and use --resume {last.folder}" if last and state is None else ""
    log.warning(
        "%s contains files of an earlier run of --output_name %s (%s), which this run will overwrite; to keep them,"
        " use another --output_name%s",
        *(save.output_dir, save.output_name, name_some(path.name for path in found), way),
    )


def _of_name(save: SaveSettings) -> Iterator[Path]:
    expert = f"(?:_(?:{'|'.join(ORDER)}))?(?:_lora)?"
    stem = rf"{re.escape(save.output_name)}{expert}(?:{MOMENT}|{BEST})?(?:{EMA})?"
    pattern = re.compile(names_of(stem, FILE))
    for path in Path(save.output_dir).iterdir():
        if pattern.fullmatch(path.name) or (path.is_dir() and is_saved_as(path.name, save.output_name, STATE)):
            yield path


def is_of_run(path: Path, session: int) -> bool:
    """Return whether a saved file or state belongs to a run; one that does not record its run does."""
    if path.is_dir():
        try:
            return open_state(path).session in (None, session)
        except InputError:
            return True
    return _metadata(path).get("ss_session_id", str(session)) == str(session)


def _metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file, or of an index's first shard; empty if it cannot be read."""
    try:
        with safe_open(expand(path)[0] if path.name.endswith(INDEX) else path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, InputError):
        return {}


@dataclass(frozen=True)
class End:
    """The end of a run: its identity, seed and position, and the number of steps per epoch."""

    identity: Identity
    seed: int
    position: Position
    epoch_steps: int

    def moments(self, step: int) -> tuple[str, ...]:
        """Return the possible names of a moment for files saved after this step, the preferred one first."""
        epoch, rest = divmod(step, self.epoch_steps)
        return (of_step(step),) if rest else (of_epoch(epoch), of_step(step))


def keep_earlier_end(save: SaveSettings, end: End, parts: Sequence[str | None], *, with_state: bool) -> list[Path]:
    """Rename the final files of this run's earlier end, before it was resumed and extended, by their epoch or step,
    since the new final files replace them. Return the renamed files; one that cannot be renamed is logged as a
    warning."""
    folder = path_of(save, "", STATE)
    state = _earlier_state(folder, end)
    kept: list[Path] = []
    for part in parts:
        for ending in (FILE, EMA_FILE):
            path = path_of(save, "", ending, part)
            step = _step_of(path, end, state)
            target = None if step is None else _free(path, save, ending, part, end.moments(step))
            if target is not None:
                with _warning_of(path):
                    kept += _keep_files(path, target)
    if with_state and state is not None:
        target = _free(folder, save, STATE, None, end.moments(state.position.step))
        if target is not None:
            with _warning_of(folder):
                kept.append(_keep_folder(folder, target))
    if kept:
        log.info("kept the previous final file as %s", name_some(path.name for path in kept))
    return kept


def _earlier_state(folder: Path, end: End) -> State | None:
    """Return the state of this run's earlier end. States from before runs had identities are matched by seed."""
    try:
        state = open_state(folder)
    except InputError:
        return None
    is_own = state.session == end.identity.session or (state.session is None and state.seed == end.seed)
    return state if is_own and state.position.step < end.position.step else None


def _step_of(path: Path, end: End, state: State | None) -> int | None:
    """Return the step after which a file was saved at an earlier end of this run; None for any other file."""
    files = [file for file in files_of(path) if file.name.endswith(FILE)]
    if not files:
        return None
    said = _metadata(files[0])
    at_state = None if state is None else state.position.step
    try:
        step = int(said["ss_steps"])
    except (KeyError, ValueError):
        return at_state  # saved without metadata
    is_own = said.get("ss_session_id") == str(end.identity.session) or step == at_state
    return step if is_own and step < end.position.step else None


def _free(path: Path, save: SaveSettings, ending: str, part: str | None, moments: Sequence[str]) -> Path | None:
    """Return the first of these moments' names that is not taken; None if one of them already holds this file, as after
    a run was killed while renaming, or if all are taken."""
    for moment in moments:
        target = path_of(save, moment, ending, part)
        there, wanted = ([each] if each.is_dir() else files_of(each) for each in (target, path))
        if not there:
            return target
        if _origin_of(there[0]) == _origin_of(wanted[0]):
            return None if len(there) == len(wanted) else target
    return None


def _origin_of(path: Path) -> tuple[object, ...]:
    """Return what identifies a saved file or state: its run and step or, if it does not record them, its inode."""
    if path.is_dir():
        try:
            state = open_state(path)
        except InputError:
            return (path,)
        return state.session, state.seed, state.position
    said = _metadata(path)
    known = said.get("ss_session_id"), said.get("ss_steps")
    return known if None not in known else (path.stat().st_dev, path.stat().st_ino)


def _keep_files(path: Path, target: Path) -> list[Path]:
    """Give a checkpoint a second name: its file, or its shards and finally a new index."""
    files, kept = files_of(path), []
    renamed = {file.name: target.stem + file.name.removeprefix(path.stem) for file in files}
    for file in files:
        place = target.with_name(renamed[file.name])
        if file.name.endswith(INDEX):
            index = json.loads(file.read_text(encoding="utf-8"))
            index["weight_map"] = {name: renamed[shard] for name, shard in index["weight_map"].items()}
            with replacing(place) as temporary:
                temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
        else:
            _link(file, place)
        kept.append(place)
    return kept


def _keep_folder(folder: Path, target: Path) -> Path:
    try:
        with replacing_folder(target) as temporary:
            for file in folder.iterdir():
                os.link(file, temporary / file.name)
    except InputError:
        folder.rename(target)
    return target


def _link(file: Path, target: Path) -> None:
    """Hard-link a file under another name; rename it where hard links are not supported."""
    try:
        os.link(file, target)
    except OSError:
        file.rename(target)


@contextlib.contextmanager
def _warning_of(path: Path) -> Iterator[None]:
    """Log a failure as a warning: it must not fail a run that has finished."""
    try:
        yield
    except (OSError, ValueError, KeyError, InputError) as problem:
        log.warning("%s will be overwritten, since it could not be renamed: %s", path, problem)
