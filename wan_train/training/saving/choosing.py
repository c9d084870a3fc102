"""Find the saved states of a run, and choose the one for `--resume auto`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dataset.sources import name_some
from networks.moments import is_saved_as
from wan_train.errors import InputError
from wan_train.log import get_logger
from wan_train.training.saving.checkpoints import STATE
from wan_train.training.saving.identity import Identity, new_identity, read_identity
from wan_train.training.saving.settings import SaveSettings
from wan_train.training.saving.state import NewerState, State, open_state

log = get_logger(__name__)


def whole_states(save: SaveSettings, *, refuse_newer: bool = False) -> list[State]:
    """Return the complete states of this output folder and name, of any run. States of a later version are skipped, or
    raise NewerState with `refuse_newer`."""
    output, whole = Path(save.output_dir), []
    if not output.is_dir():
        return []
    for folder in sorted(output.iterdir()):
        if not (folder.is_dir() and is_saved_as(folder.name, save.output_name, STATE)):
            continue
        try:
            whole.append(open_state(folder))
        except InputError as problem:
            if refuse_newer and isinstance(problem, NewerState):
                raise
    return whole


def farthest(states: Sequence[State]) -> State | None:
    """Return the state with the most steps; among equals the one saved last."""
    return max(states, key=lambda state: (state.position.step, _saved_at(state)), default=None)


def _saved_at(state: State) -> float:
    """Return the time when a state was saved, by its folder; 0 for one that is not downloaded yet."""
    try:
        return state.folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def newest_of(save: SaveSettings, session: int) -> State | None:
    """Return the state of a run with the most steps."""
    return farthest([state for state in whole_states(save) if state.session == session])


def choose(save: SaveSettings, fits: Callable[[State], bool], states: Sequence[State] | None = None) -> State | None:
    """Choose the state for `--resume auto`: the one with the most steps of the latest run of this name or, if it has
    saved none yet, the state that it was resumed from. None means a fresh start.

    If the latest run is not recorded, choose from the run that started last. Among states that do not record their run,
    prefer those that match these options (`fits`); if none match, choose from all, and the differences are reported
    later. `states` are the candidates; default: all of this output folder and name. Raise NewerState if there is a
    state of a later version, which may be the wanted one.
    """
    states = whole_states(save, refuse_newer=True) if states is None else states
    last = read_identity(save)
    if last is None:
        newest = max((state.started_at for state in states), default=0.0)
        candidates = [state for state in states if state.started_at == newest]
        unknown = candidates and candidates[0].session is None
        return farthest((unknown and [state for state in candidates if fits(state)]) or candidates)
    own = farthest([state for state in states if state.session == last.session])
    if own is None and last.resumed_from is not None:
        own = _if_whole(Path(last.resumed_from))
    if own is None and states:
        log.warning(
            "--resume auto: the last run of %s saved no state, and states of earlier runs are not used (%s): to resume"
            " one of them use --resume FOLDER",
            *(save.output_name, name_some(state.folder.name for state in states)),
        )
    return own


def _if_whole(folder: Path) -> State | None:
    try:
        return open_state(folder)
    except InputError:
        return None


def identity_of(state: State | None, save: SaveSettings) -> Identity:
    """Return the identity of the run that starts from a state, or afresh. It is the state's, unless the run has later
    states: then this is a new run, so that those are not taken for its own."""
    if state is None:
        return new_identity()
    if state.session is None or _is_left_behind(state, save):
        return new_identity(state.folder)
    return Identity(state.session, state.started_at, str(state.folder.resolve()))


def _is_left_behind(state: State, save: SaveSettings) -> bool:
    own = [each for each in whole_states(save) if each.session == state.session]
    return any(each.position.step > state.position.step for each in own)
