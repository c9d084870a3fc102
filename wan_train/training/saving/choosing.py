"""Which states of an output folder are a run's, and which one `--resume auto` takes."""

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
    """The whole states of this output folder and name, of whatever run. Those of a later version are left out, or with
    `refuse_newer` a NewerState."""
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
    """The state that has come farthest, of several the one that was saved last."""
    return max(states, key=lambda state: (state.position.step, _saved_at(state)), default=None)


def _saved_at(state: State) -> float:
    """When a state was saved, as its folder says; 0 for one that is not on this machine yet."""
    try:
        return state.folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def newest_of(save: SaveSettings, session: int) -> State | None:
    """The state of a run that has come farthest."""
    return farthest([state for state in whole_states(save) if state.session == session])


def choose(save: SaveSettings, fits: Callable[[State], bool], states: Sequence[State] | None = None) -> State | None:
    """The state that `--resume auto` takes: the farthest of the run of this name that began last, or where that has
    saved none yet, the one that it was itself resumed from. None for a fresh start.

    Where it is not known which run that is, it is the one of the states that began last; states that say nothing of
    runs are the farthest of those of these options (`fits`), or where none are, of all: the differences will be told.
    `states` are those to choose from; default: all of this output folder and name. Raises NewerState where there is a
    state of a later version, which may be the one that is wanted.
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
            "--resume auto: the last run of %s saved no state, and states of earlier ones are not taken (%s): to resume"
            " one of them give --resume FOLDER",
            *(save.output_name, name_some(state.folder.name for state in states)),
        )
    return own


def _if_whole(folder: Path) -> State | None:
    try:
        return open_state(folder)
    except InputError:
        return None


def identity_of(state: State | None, save: SaveSettings) -> Identity:
    """The run that begins with a state, or afresh. It is the state's, unless later ones of that are there too: what
    leaves them behind is a run of its own, so that they do not pass for its."""
    if state is None:
        return new_identity()
    if state.session is None or _is_left_behind(state, save):
        return new_identity(state.folder)
    return Identity(state.session, state.started_at, str(state.folder.resolve()))


def _is_left_behind(state: State, save: SaveSettings) -> bool:
    own = [each for each in whole_states(save) if each.session == state.session]
    return any(each.position.step > state.position.step for each in own)
